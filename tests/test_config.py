from __future__ import annotations

from pathlib import Path

import pytest

from mamba_pretrain import config as c

ROOT = Path(__file__).parent.parent
SMALL = ["model.d_model=32", "model.n_layer=2", "train.steps=10", "data.seq_len=64", "train.batch_tokens=512"]


def problems(*overrides: str, world: int = 1) -> list[str]:
    with pytest.raises(c.ConfigError) as caught:
        c.load([], [*SMALL, *overrides], world=world)
    return caught.value.problems


def test_every_problem_is_reported_at_once_with_the_nearest_name() -> None:
    found = "\n".join(
        problems("optim.lrr=1", "trian.steps=4", "train.batch_tokens=-5", "data.seq_len=abc", "optim.schedule=cosin")
    )
    for part in (
        "unknown key optim.lrr: did you mean optim.lr?",
        "unknown key trian.steps: did you mean train.steps?",
        "train.batch_tokens is -5",
        "data.seq_len is 'abc'",
        "optim.schedule is 'cosin': did you mean cosine?",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_tokens=500", "is not a multiple of data.seq_len (64): the nearest is 448 or 512"),
        ("train.batch_tokens=0", "train.batch_tokens is 0"),
        ("train.engine=zer", "did you mean zero?"),
        ("zero.stage=0", "in bf16 trains wrongly"),
        ("zero.stage=4", "expected 1, 2 or 3"),
        ("zero.offload_parameters=true", "needs zero.stage=3"),
        ("fsdp.replicas=0", "fsdp.replicas is 0"),
        ("train.micro_batch_size=3", "which train.micro_batch_size (3) x 1 rank(s) does not divide"),
        ("train.tokens=1000", "give exactly one of train.steps and train.tokens: found 10 and 1000"),
        ("train.precision=bf15", "did you mean bf16?"),
        ("model.variant=13m", "model.variant is '13m': did you mean 130m?"),
        ("model.d_conv=9", "model.d_conv is 9"),
        ("model.d_state=1000", "at most 256"),
        ("model.dt_min=1", "must lie above 0 and below dt_max"),
        ("optim.min_lr=1", "between 0 and optim.lr"),
        ("optim.beta1=1.0", "below 1"),
        ("log.sinks=[console,tensorbord]", "did you mean tensorboard?"),
        ("model=3", "model is a section, not a value"),
        ("data.path.inner=3", "unknown key data.path.inner: did you mean data.path?"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last is 0"),
        ("nonsense", "not of the form key=value"),
        ("log.sinks=[jsonl,jsonl]", "each sink once"),
        ("optim.clip_norm=nan", "optim.clip_norm is nan: it must be a finite number"),
        ("optim.lr=inf", "optim.lr is inf"),
        ("train.steps=12.7", "train.steps is 12.7"),
        ("data.path=${nope}", "placeholders are not filled in"),
        ("data.path=???", "placeholders are not filled in"),
        ("data.sources=[{pth: a}]", "unknown key data.sources[0].pth: did you mean path?"),
        ("data.sources=[{path: a, weight: much}]", "data.sources[0].weight is 'much'"),
        ("data.sources=[{weight: 1}]", "data.sources[0].path is not set"),
        ("data.sources=[a]", "data.sources[0] is 'a': expected {path, name, weight, max_epochs}"),
        ("data.sources=5", "data.sources is 5: expected a list of {path"),
        ("data.sources={path: a}", "data.sources.path is 'a': data.sources is a list of {path, name, weight"),
        ("data.sources[0].weight=2", "data.sources.0.weight is 2: data.sources is a list of"),
        ("data.sources=[{path: a, weight: -1}]", "data.sources[0].weight is -1"),
        ("data.sources=[{path: a, max_epochs: 0}]", "data.sources[0].max_epochs is 0"),
        ("data.sources=[{path: x/a}, {path: y/a}]", "2 of data.sources are called 'a'"),
        ("data.sources=[{path: a, weight: 1}, {path: b}]", "b without a weight, the others with one"),
        ("data.sources=[{path: a, weight: 0}, {path: b, weight: 0}]", "are all 0"),
        ("data.sources=[{path: a, weight: 0.123457}, {path: b, weight: 1}]", "the common denominator 1,123,457"),
        ("data.packing=best-fit", "did you mean best_fit?"),
        ("data.stages=[{from_tokens: 5}]", "the first stage begins at 0"),
        ("data.stages=[{}, {from_tokens: 1000}, {from_tokens: 1000}]", "above that of the stage before it"),
        ("data.stages=[{}, {from_tokens: 1000}, {from_tokens: 1001}]", "it would have no steps"),
        ("data.stages=[{seq_len: 32}]", "data.stages[0].seq_len is 32, the first stage's is data.seq_len (64)"),
        ("data.stages=[{}, {from_tokens: 512, seq_len: 48}]", "the row length 48 does not divide the longest, 64"),
        ("data.stages=[{}, {from_tokens: 512, seq_len: 1024}]", "8 x 64, which rows of 1024 do not divide"),
        ("data.stages=[{weights: {a: 1}}]", "data.stages[0].weights names a: no source is named"),
    ],
)
def test_impossible_values_are_refused(override: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(override)), problems(override)


def test_a_value_that_was_not_read_causes_no_second_complaint() -> None:
    assert len(problems("train.steps=many")) == 1


def test_a_token_budget_may_be_written_as_a_float_and_an_empty_section_is_no_mistake() -> None:
    config = c.load([], ["model.d_model=8", "model.n_layer=1", "train.tokens=3e9", "optim=null"])
    assert config.train.tokens == 3_000_000_000 and config.optim == c.OptimConfig()


def test_the_digest_follows_the_training_and_not_where_it_runs() -> None:
    base = c.load([], SMALL)
    for same in ("run_dir=elsewhere", "data.workers=7", "checkpoint.resume=auto", "log.every_steps=3"):
        assert c.load([], [*SMALL, same]).digest() == base.digest(), same
    for other in ("optim.lr=2e-3", "model.d_state=8", "data.seq_len=32", "train.seed=1"):
        assert c.load([], [*SMALL, other]).digest() != base.digest(), other


def test_the_batch_must_divide_over_ranks() -> None:
    fsdp = "train.engine=fsdp"
    c.load([], [*SMALL, "train.micro_batch_size=4", fsdp], world=2)
    assert "x 3 rank(s) does not divide" in problems("train.micro_batch_size=4", fsdp, world=3)[0]


def test_one_process_engines_and_uneven_replicas_are_refused_on_several_ranks() -> None:
    assert "train.engine is single, and this is one of 2 ranks" in "".join(problems(world=2))
    assert "does not divide the 2 ranks" in "".join(problems("train.engine=fsdp", "fsdp.replicas=3", world=2))


def test_later_sources_win_and_the_variant_is_below_all_of_them(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {variant: 130m, n_layer: 3}\ntrain: {steps: 5}\noptim: {lr: 0.5}\n")
    second.write_text("optim: {lr: 0.25}\n")
    config = c.load([first, second], ["train.steps=7"])
    assert (config.model.d_model, config.model.n_layer, config.optim.lr, config.train.steps) == (768, 3, 0.25, 7)


MIXTURE = """
data:
  sources:
    - {path: data/web, weight: 0.7}
    - {path: data/github, name: code, weight: 0.3, max_epochs: 4}
  stages:
    - {}
    - {from_tokens: 1e3, weights: {code: 0.7}, seq_len: 128}
    - {from_tokens: 2e3, weights: {web: 0}}
"""


def test_stages_keep_what_they_leave_out(tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    config = c.load([tmp_path / "mixture.yaml"], [*SMALL, "train.micro_batch_size=2"])
    first, second, third = config.stages
    assert (first.seq_len, first.first_step, first.first_sample, first.weights) == (64, 0, 0, {"web": 0.7, "code": 0.3})
    assert (second.seq_len, second.first_step, second.first_sample) == (128, 2, 16)
    assert (second.micro_batch_size, second.sequences_per_step, second.weights) == (1, 4, {"web": 0.7, "code": 0.7})
    assert (third.seq_len, third.first_step, third.first_sample, third.weights) == (128, 4, 24, {"web": 0, "code": 0.7})
    assert [config.samples_at(step) for step in (0, 1, 2, 3, 4, 5)] == [0, 8, 16, 20, 24, 28]
    c.save(config, tmp_path / "again.yaml")
    assert c.load([tmp_path / "again.yaml"]) == config
    with pytest.raises(c.ConfigError, match=r"data.stages\[1\].weights names cod: did you mean code\?"):
        c.load([tmp_path / "mixture.yaml"], [*SMALL, "data.stages=[{}, {from_tokens: 600, weights: {cod: 1}}]"])
    with pytest.raises(c.ConfigError, match="data.path and data.sources are both given"):
        c.load([tmp_path / "mixture.yaml"], [*SMALL, "data.path=data/web"])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(c.ConfigError) as caught:
        c.load([tmp_path / "absent.yaml", broken])
    text = str(caught.value)
    assert "absent.yaml" in text and f"{broken} is not a YAML mapping" in text


def test_a_saved_configuration_loads_back_equal(tmp_path: Path) -> None:
    config = c.load([], [*SMALL, "log.sinks=[jsonl]", "optim.lr=1.5e-3"])
    c.save(config, tmp_path / "config.yaml")
    again = c.load([tmp_path / "config.yaml"])
    assert again == config
    assert again.digest() == config.digest()
    assert c.load([], [*SMALL, "optim.lr=2e-3"]).digest() != config.digest()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    c.load([path])


@pytest.mark.parametrize(
    ("variant", "lr", "batch", "steps"),
    [
        ("130m", 3.0e-3, 2**19, 572_205),
        ("370m", 1.5e-3, 2**19, 572_205),
        ("790m", 1.25e-3, 2**19, 572_205),
        ("1.4b", 1.0e-3, 2**20, 286_103),
        ("2.8b", 4.8e-4, 2**20, 286_103),
    ],
)
def test_presets_are_the_published_recipe(variant: str, lr: float, batch: int, steps: int) -> None:
    config = c.load([ROOT / "configs/pretrain" / f"{variant}.yaml"])
    assert (config.optim.lr, config.train.batch_tokens, config.steps) == (lr, batch, steps)
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay, config.optim.clip_norm) == (
        0.9,
        0.95,
        0.1,
        1.0,
    )
    assert (config.optim.min_lr, config.optim.schedule, config.optim.warmup_fraction) == (1e-5, "cosine", 0.1)
    assert (config.data.seq_len, config.model.variant, config.model.padded_vocab_size) == (2048, variant, 50280)


def test_a_dataset_in_the_working_directory_is_called_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = c.load([], [*SMALL, "data.path=."]).data.named_sources
    assert source.name == tmp_path.name
    with pytest.raises(c.ConfigError, match=r"data.sources\[0\] has no name: / is no directory to be called by"):
        c.load([], [*SMALL, "data.sources=[{path: /}]"])
