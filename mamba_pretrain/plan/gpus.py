"""GPUs by their data sheets. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Peaks of one GPU: bytes, FLOP/s, bytes/s. Links count one direction."""

    device_name: str  # what torch.cuda.get_device_name begins with
    memory: float
    bf16_flops: float  # dense, tensor cores, fp32 accumulation; fp16 has the same
    fp32_flops: float  # outside of the tensor cores: the scan and fp32 products
    memory_bandwidth: float
    peer_bandwidth: float  # to another GPU of the node: NVLink, or PCIe where there is none
    host_bandwidth: float  # PCIe
    network_bandwidth: float  # a GPU's share of its node's adapters


# Sources: NVIDIA's data sheets of the A100 (2021), H100 (2023), H200 (2023), L40S (2023) and HGX B200 (2024, an eighth
# of the figures for 8 GPUs). Sheets give peaks with sparsity from the H100 on: the dense ones here are half of those;
# NVLink in both directions together: half. The network is that of DGX A100 (8 x 200 Gb/s), DGX H100, H200 and B200
# (8 x 400 Gb/s); for the rest 100 Gb/s a GPU is an assumption.
GPUS = {
    "a100-40": GPU("NVIDIA A100-SXM4-40GB", 40e9, 312e12, 19.5e12, 1555e9, 300e9, 32e9, 25e9),
    "a100": GPU("NVIDIA A100", 80e9, 312e12, 19.5e12, 2039e9, 300e9, 32e9, 25e9),
    "h100-pcie": GPU("NVIDIA H100 PCIe", 80e9, 756e12, 51e12, 2000e9, 64e9, 64e9, 12.5e9),
    "h100": GPU("NVIDIA H100 80GB HBM3", 80e9, 989e12, 67e12, 3350e9, 450e9, 64e9, 50e9),
    "h200": GPU("NVIDIA H200", 141e9, 989e12, 67e12, 4800e9, 450e9, 64e9, 50e9),
    "b200": GPU("NVIDIA B200", 180e9, 2250e12, 75e12, 7700e9, 900e9, 64e9, 50e9),
    "l40s": GPU("NVIDIA L40S", 48e9, 362e12, 91.6e12, 864e9, 32e9, 32e9, 12.5e9),
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak, FLOP/s, of a device as torch names it; None where it is unknown, and never a guess."""
    return next((gpu.bf16_flops for gpu in GPUS.values() if device_name.startswith(gpu.device_name)), None)
