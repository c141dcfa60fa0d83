// The C interface that native_ops.py and native_decode.py call through ctypes: no PyTorch headers, so no ABI to match.
// `half`: activations (for decoding: matrices) are bf16, else fp32.
#include "conv.h"
#include "rows.h"
#include "scan.h"
#include "step.h"

extern "C" {

int64_t mamba_chunk() { return CHUNK; }
int64_t mamba_group() { return GROUP; }

void mamba_scan_forward(const ScanArgs* a, int half) { half ? scan_forward<bf16>(*a) : scan_forward<float>(*a); }
void mamba_scan_backward(const ScanArgs* a, int half) { half ? scan_backward<bf16>(*a) : scan_backward<float>(*a); }
void mamba_conv_forward(const ConvArgs* a, int half) {
  if (a->taps == 4)
    half ? conv_forward<bf16, 4>(*a) : conv_forward<float, 4>(*a);
  else
    half ? conv_forward<bf16, 0>(*a) : conv_forward<float, 0>(*a);
}

void mamba_conv_backward(const ConvArgs* a, int half) {
  if (a->taps == 4)
    half ? conv_backward<bf16, 4>(*a) : conv_backward<float, 4>(*a);
  else
    half ? conv_backward<bf16, 0>(*a) : conv_backward<float, 0>(*a);
}

void mamba_cross_entropy(const LossArgs* a, int half) { half ? cross_entropy<bf16>(*a) : cross_entropy<float>(*a); }
void mamba_decode_step(const StepArgs* a, int half) { half ? decode_step<bf16>(*a) : decode_step<float>(*a); }

void mamba_norm_forward(const NormArgs* a, int half_x, int half_y) {
  if (half_x)
    half_y ? norm_forward<bf16, bf16>(*a) : norm_forward<bf16, float>(*a);
  else
    half_y ? norm_forward<float, bf16>(*a) : norm_forward<float, float>(*a);
}

void mamba_norm_backward(const NormArgs* a, int half_x, int half_y) {
  if (half_x)
    half_y ? norm_backward<bf16, bf16>(*a) : norm_backward<bf16, float>(*a);
  else
    half_y ? norm_backward<float, bf16>(*a) : norm_backward<float, float>(*a);
}
}
