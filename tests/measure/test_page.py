"""The page of `benchmark --report`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure import models, operators, page, torch_peers
from tokenvit_jax.models.backbone import Trainable


class MeanModel(Trainable):
    """One linear layer."""

    width: int

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(self.width)(images.mean((1, 2)))


def conv_cases(batch, dtype):
    x = jnp.ones((1, 4, 4, 2))
    call = lambda x: x + 1  # noqa: E731
    yield operators.Case({"side": 4}, (x,), 1, {"plain": call, "depthwise_conv": call})


@pytest.fixture
def plan(monkeypatch):
    """A plan whose models and operators compile at once, without timm."""

    def create(name, dtype=None, token_reducer=None):
        return MeanModel(100 if token_reducer else 2000)

    def import_package(name):
        raise UserError("torch is not installed")

    monkeypatch.setattr(models, "create_model", create)
    monkeypatch.setattr(page, "SECONDS", 0.01)
    monkeypatch.setattr(page, "CASE_SECONDS", 0.01)
    # After many other tests, a collection between two parts takes seconds.
    monkeypatch.setattr(page.gc, "collect", lambda: None)
    monkeypatch.setattr(torch_peers, "import_package", import_package)
    monkeypatch.setitem(operators.CASES, "depthwise_conv", conv_cases)
    return page.Plan(
        image_size=(32, 32),
        batch_size=2,
        dtype=jnp.dtype("float32"),
        small=("narrow",),
        large=(),
        insertions={"narrow": {"pooled": {"token_reducer": {"keep": (3,)}}}},
        lengths=((2, 16, 1),),
        operators=("depthwise_conv",),
    )


def tables_of(text):
    """Returns the rows of every table by the title that it stands under."""
    tables = {}
    for part in text.split(page.HEADING)[1:]:
        title, *lines = part.splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        tables[title] = [row for row in rows if row[0] != "---"]
    return tables


def test_all_parts(plan, monkeypatch):
    monkeypatch.setattr(operators, "TOP_K", 4)
    monkeypatch.setattr(operators, "NUM_GROUPS", 2)
    *earlier, text = page.measure_page(plan, 60, "tokenvit benchmark --report")
    # After every table, and at the end of a part.
    assert [len(tables_of(before)) for before in earlier] == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5]
    assert [len(tables_of(before)["Training step"]) for before in earlier[:2]] == [
        2, len(tables_of(text)["Training step"]),
    ]  # fmt: skip
    assert text.startswith("# cpu\n\nWritten by `tokenvit benchmark --report` on 20")
    assert "No comparison with timm: torch is not installed." in text
    tables = tables_of(text)
    assert [*tables] == [
        "Training step", "Forward pass", "Attention by number of tokens",
        "Token reducers, forward pass", "Operator `depthwise_conv`",
    ]  # fmt: skip
    for title in ("Training step", "Forward pass"):
        header, row, *profile = tables[title]
        assert header[:4] == ["model", "GMACs", "ms", "images/s"] and row[0] == "`narrow`"
        assert float(row[3]) == pytest.approx(2e3 / float(row[2]), rel=0.02)
        assert profile[0] == ["part", "`narrow`"]
        assert sum(float(time) for _, time in profile[1:]) > 0
    attention = tables["Attention by number of tokens"]
    assert [row[:4] for row in attention[1:]] == [
        ["2", "16", "1", "forward"], ["2", "16", "1", "forward + backward"]
    ]  # fmt: skip
    einsum, ours, group, gain = map(float, attention[1][4:])
    assert gain == pytest.approx(min(einsum, ours) / group, rel=0.05)
    reducers = tables["Token reducers, forward pass"]
    assert reducers[2][0] == "`narrow pooled`"
    assert float(reducers[2][5]) == pytest.approx(20, rel=0.01)  # saved multiply-adds


def test_what_does_not_fit_is_named(plan):
    plan = plan._replace(insertions={}, lengths=())
    *_, text = page.measure_page(plan, 0.9, "command")
    assert "- Training step: 6 minutes are needed\n- Forward pass: 3 minutes are needed" in text
    assert [*tables_of(text)] == ["Operator `depthwise_conv`", "Not measured"]


def test_what_fails_is_named_and_ends_nothing(plan, monkeypatch):
    def lacks_memory(*args, **kwargs):
        raise MemoryError("a training step needs 90 of 80 GiB\nand more")

    monkeypatch.setattr(models, "build_contenders", lacks_memory)
    plan, pages = plan._replace(insertions={}, lengths=()), []
    with pytest.raises(UserError, match=r"that the page gives: Training step; Forward pass$"):
        for text in page.measure_page(plan, 60, "command"):
            pages.append(text)
    assert "- Training step: a training step needs 90 of 80 GiB\n" in pages[-1]
    assert "Operator `depthwise_conv`" in tables_of(pages[-1])


class Failing(MeanModel):
    """Raises an error while it is compiled, or while it runs."""

    compiles: bool = True

    def __call__(self, images, train):
        if self.compiles:
            images = jax.pure_callback(self.fail, images, images)
        elif images.shape[0] > 1:
            self.fail(images)
        return super().__call__(images, train)

    def fail(self, images):
        raise ValueError(f"{images.shape[0]} images are too many")


def test_one_model_that_fails_leaves_the_others(plan, monkeypatch):
    created = {
        "narrow": MeanModel(100), "uncompiled": Failing(100, compiles=False), "lost": Failing(100)
    }  # fmt: skip
    monkeypatch.setattr(models, "create_model", lambda name, dtype=None: created[name])
    plan = plan._replace(small=[*created], insertions={}, lengths=(), operators=())
    *_, text = page.measure_page(plan, 60, "command")
    for title in ("Training step", "Forward pass"):
        _, row, *profile = tables_of(text)[title]
        assert row[0] == "`narrow`" and profile[0] == ["part", "`narrow`"]
    assert text.count("`uncompiled` was not measured: 2 images are too many") == 2
    assert text.count("`lost` was not measured: ") == 2
    failing = plan._replace(small=("lost",))
    with pytest.raises(UserError, match="Training step; Forward pass"):
        for text in page.measure_page(failing, 60, "command"):  # noqa: B007
            pass
    assert "- Training step: " in text


@pytest.mark.parametrize("fault", ["error", "nothing"])
def test_a_profile_that_fails_leaves_the_times(plan, monkeypatch, fault):
    def times_of_parts(*_):
        if fault == "error":
            raise AttributeError("ProfileData has no planes")
        return {"norms": 0.0}

    monkeypatch.setattr(page, "times_of_parts", times_of_parts)
    plan = plan._replace(insertions={}, lengths=(), operators=())
    *_, text = page.measure_page(plan, 60, "command")
    assert [len(table) for table in tables_of(text).values()] == [2, 2]
    reason = "ProfileData has no planes" if fault == "error" else "the profiler recorded no kernel"
    assert text.count(f"No profile: {reason}") == 2


def test_a_broken_package_leaves_our_models(plan, monkeypatch):
    def check_peers(package):
        raise ValueError("numpy.dtype size changed")

    monkeypatch.setattr(torch_peers, "check_peers", check_peers)
    *_, text = page.measure_page(plan, 0, "command")
    assert "No comparison with timm: numpy.dtype size changed." in text


def test_packages_of_dense_tasks(plan, monkeypatch):
    """One of two packages is missing."""

    def check_peers(package):
        if package == "torchvision":
            raise UserError("timm is not installed")

    monkeypatch.setattr(torch_peers, "check_peers", check_peers)
    monkeypatch.setattr(torch_peers, "environment", lambda package: {package: "1.2.3"})
    tasks = [
        page.TaskPlan("A net", models.Kind(None, None, "transformers"), "a", "b", (32, 64), 2),
        page.TaskPlan("A detector", models.Kind(None, None, "torchvision"), "a", "b", (32, 64), 1),
    ]
    *_, text = page.measure_page(plan._replace(tasks=tasks), 0, "command")
    lines = " ".join(text.split())
    assert ": A net, batch 2; A detector, batch 1, float32," in lines
    assert "transformers 1.2.3" in lines and "torchvision 1.2.3" not in lines
    assert "No comparison with torchvision: timm is not installed. ##" in lines
    assert "with transformers" not in lines


@pytest.mark.slow
def test_dense_tasks(plan):
    def subject(name, dtype, width=2000):
        del name, dtype
        model = MeanModel(width)
        return models.Subject(
            model, lambda size, batch: models.CLASSIFICATION.subject("narrow").work(size, batch)
        )

    kind = models.Kind(subject, lambda *args: pytest.fail("torch is not installed"), "transformers")
    task = page.TaskPlan(
        "A net", kind, "host", "peer", (32, 64), 2, {"few": {"width": 100}}, (64, 64)
    )
    *_, text = page.measure_page(plan._replace(tasks=[task]), 60, "tokenvit benchmark --report")
    assert "No comparison with transformers: torch is not installed." in text
    tables = tables_of(text)
    assert [*tables] == [
        "A net, 32 x 64, forward pass", "A net, 32 x 64, training step",
        "A net, 64 x 64, clustered tokens, forward pass",
    ]  # fmt: skip
    [_, plain, few] = tables["A net, 64 x 64, clustered tokens, forward pass"]
    assert (plain[0], few[0]) == ("`host`", "`host few`")
    assert float(few[5]) == pytest.approx(20, rel=0.01)  # saved multiply-adds
