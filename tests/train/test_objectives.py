"""Every objective against its formula, written out number by number, and in a training step."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import distance, randomise

import jpeft
from jpeft.errors import BatchesError, TrainConfigError
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.rope import Rope
from jpeft.train import create, losses, make_train_step, objectives, tagging
from jpeft.train.evaluate import evaluate_embeddings, evaluate_preferences, evaluate_tags

KEY = jax.random.key(0)
RNG = np.random.RandomState(0)
NORMAL = RNG.standard_normal


def close(found: Any, want: Any) -> None:
    assert distance(found, want) <= 1e-5


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def log_softmax(row: np.ndarray) -> np.ndarray:
    return row - math.log(sum(math.exp(x) for x in row))


@pytest.mark.parametrize("hard", [0, 1, 2])
def test_contrastive(hard: int) -> None:
    anchors, positives, weights = NORMAL((5, 4)), NORMAL((5, 4)), np.float32([1, 1, 0, 1, 1])
    negatives = NORMAL((5, hard, 4)) if hard else None
    found = objectives.contrastive(jnp.float32(anchors), jnp.float32(positives),
                                   None if negatives is None else jnp.float32(negatives), weights=weights,
                                   temperature=0.3)
    real = [0, 1, 3, 4]
    for i in real:
        others = [positives[j] for j in real] + [n for j in real for n in (negatives[j] if hard else ())]
        scores = [math.exp(cosine(anchors[i], other) / 0.3) for other in others]
        own = math.exp(cosine(anchors[i], positives[i]) / 0.3)
        close(found.losses[i], -math.log(own / sum(scores)))
        assert bool(found.right[i]) == (own == max(scores))
    assert not bool(found.right[2])


def test_contrastive_gradients_are_finite_where_a_row_only_fills() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return losses.ranked(x, jnp.float32([1, 1, 0]), 0.05)[0]

    vectors = jnp.float32(NORMAL((3, 2, 4))).at[2].set(0.0)
    grads = jax.grad(loss)(vectors)
    assert bool(jnp.isfinite(grads).all())
    assert not bool(grads[2].any())
    nothing, metrics = losses.ranked(vectors, jnp.zeros(3), 0.05)
    assert (float(nothing), float(metrics["count"])) == (0, 0)


@pytest.mark.parametrize(("variant", "smooth"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)])
def test_preference(variant: Any, smooth: float) -> None:
    chosen, rejected, before, after = NORMAL((4, 6))
    found = objectives.preference(*map(jnp.float32, (chosen, rejected, before, after)), beta=0.7,
                                  label_smoothing=smooth, variant=variant)
    for i in range(6):
        more = (chosen[i] - rejected[i]) - (before[i] - after[i])
        sigmoid = 1 / (1 + math.exp(-0.7 * more))
        want = {"sigmoid": -(1 - smooth) * math.log(sigmoid) - smooth * math.log(1 - sigmoid),
                "ipo": (more - 1 / 1.4) ** 2, "hinge": max(0.0, 1 - 0.7 * more)}[variant]
        assert math.isclose(float(found.losses[i]), want, rel_tol=1e-5, abs_tol=1e-6)
        assert math.isclose(float(found.margins[i]), 0.7 * more, rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation(alpha: float) -> None:
    student, teacher, labels = NORMAL((3, 5)), NORMAL((3, 5)), np.array([4, -1, 0])
    found = objectives.distillation(jnp.float32(student), jnp.float32(teacher), labels, temperature=3.0, alpha=alpha)
    for i in range(3):
        p, q = (np.exp(log_softmax(x[i] / 3)) for x in (teacher, student))
        far = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard = -log_softmax(student[i])[labels[i]] if labels[i] >= 0 else 0.0
        assert math.isclose(float(found[i]), 9 * alpha * far + (1 - alpha) * hard, rel_tol=1e-5, abs_tol=1e-6)
    grads = jax.grad(lambda t: objectives.distillation(jnp.float32(student), t, labels).sum())(jnp.float32(teacher))
    assert not bool(grads.any())


def test_distillation_of_tokens_counts_what_has_a_label() -> None:
    student, teacher = jnp.float32(NORMAL((2, 3, 4))), jnp.float32(NORMAL((2, 3, 4))).at[1].set(jnp.nan)
    batch = {"labels": jnp.array([[1, -1, 3], [2, 2, 2]]), "weights": jnp.float32([[1, 1, 0.5], [0, 0, 0]])}
    loss, metrics = losses.distillation(lambda *_: student, lambda *_: teacher, temperature=2.0, alpha=0.4)(
        None, None, batch, KEY)
    each = objectives.distillation(student[0], teacher[0], batch["labels"][0], temperature=2.0, alpha=0.4)
    close(loss, (each[0] + 0.5 * each[2]) / 1.5)
    assert float(metrics["count"]) == 1.5


def test_token_classification_is_a_mean_over_tagged_tokens() -> None:
    logits = jnp.float32(NORMAL((2, 3, 4))).at[1, 2].set(jnp.inf)
    batch = {"tokens": 0, "attention_mask": 0, "labels": jnp.array([[3, -1, 0], [-1, 1, -1]]),
             "weights": jnp.float32([[1, 0, 1], [0, 1, 0]])}
    loss, metrics = losses.token_classification(lambda *_, key: logits)(None, None, batch, KEY)
    picked = [log_softmax(np.asarray(logits)[b, t])[n] for b, t, n in ((0, 0, 3), (0, 2, 0), (1, 1, 1))]
    close(loss, -np.mean(picked))
    assert float(metrics["count"]) == 3
    worse = {**batch, "weights": jnp.ones((2, 3)).at[1, 2].set(0)}
    assert float(losses.token_classification(lambda *_, key: logits)(None, None, worse, KEY)[1]["count"]) == 3


@pytest.mark.parametrize(("call", "said"), [
    (lambda: objectives.contrastive(jnp.eye(2), jnp.eye(2), temperature=0.0), "temperature = 0.0 must be above 0"),
    (lambda: objectives.preference(*[jnp.ones(1)] * 4, beta=0.0), "beta = 0.0 must be above 0"),
    (lambda: objectives.preference(*[jnp.ones(1)] * 4, variant="dpo"), "'dpo' is none of sigmoid, ipo, hinge"),
    (lambda: objectives.preference(*[jnp.ones(1)] * 4, variant="ipo", label_smoothing=0.1), "for variant = 'sigmoid'"),
    (lambda: objectives.distillation(jnp.ones(2), jnp.ones(2)), "pass labels, or alpha=1"),
    (lambda: objectives.distillation(jnp.ones(2), jnp.ones(2), alpha=2.0), "alpha = 2.0 in"),
])
def test_numbers_that_make_no_sense(call: Any, said: str) -> None:
    with pytest.raises(TrainConfigError, match=said):
        call()


def test_entities_are_strictly_bio() -> None:
    tags = ["B-A", "I-A", "I-B", "O", "I-A", "B-A", "B-A", "I-A", "O", "B-B"]
    assert tagging.entities(tags) == {(0, 2, "A"), (5, 6, "A"), (6, 8, "A"), (9, 10, "B")}
    found = tagging.f1([tags], [["B-A", "I-A", "O", "O", "O", "B-A", "I-A", "I-A", "O", "B-A"]])
    assert (found["precision"], found["recall"]) == (1 / 3, 1 / 4)
    assert found["f1"] == 2 / 7
    assert tagging.f1([["O"]], [["O"]])["f1"] == 0


def test_evaluations_do_not_depend_on_the_batches() -> None:
    vectors, scores = NORMAL((6, 3, 4)).astype(np.float32), np.float32([0.9, 0.8, 0.1, 0.9, 0.5, 0.2])

    def batch(rows: list[int], fill: int) -> dict[str, np.ndarray]:
        real = np.arange(len(rows)) < len(rows) - fill
        return {"x": vectors[rows], "weights": ((scores[rows] > 0.3) & real).astype(np.float32),
                "scores": np.where(real, scores[rows], np.nan).astype(np.float32)}

    def apply(t: Any, f: Any, batch: Any, key: Any) -> Any:
        assert key is None
        return batch["x"]

    parts = [batch([0, 1, 2, 3], 0), batch([4, 5, 4, 4], 2)]
    found = evaluate_embeddings(apply, None, None, parts, 0.1)
    real = [0, 1, 3, 4]
    ranks = []
    for i in real:
        own = cosine(vectors[i, 0], vectors[i, 1])
        ranks.append(sum(cosine(vectors[i, 0], vectors[j, s]) >= own for j in real for s in (1, 2)))
    close(found.metrics["mrr"], np.mean([1 / rank for rank in ranks]))
    assert found.metrics["recall_at_1"] == np.mean([rank == 1 for rank in ranks])
    assert found.right.tolist() == [rank == 1 for rank in ranks]
    near = [cosine(*vectors[i, :2]) for i in range(6)]
    by_rank = [np.array([sum(y < x for y in values) + (sum(y == x for y in values) + 1) / 2 for x in values])
               for values in (scores, near)]
    close(found.metrics["spearman"], np.corrcoef(*by_rank)[0, 1])
    whole = evaluate_embeddings(apply, None, None, [batch([0, 1, 2, 3, 4, 5], 0)], 0.1)
    assert whole.metrics["mrr"] == found.metrics["mrr"]
    with pytest.raises(BatchesError, match="there are no pairs"):
        evaluate_embeddings(apply, None, None, [batch([2, 5], 0)], 0.1)


def test_nothing_to_judge() -> None:
    with pytest.raises(BatchesError, match="there are no pairs"):
        evaluate_preferences(lambda *_: jnp.zeros((1, 2)), lambda *_: jnp.zeros((1, 2)), None, None,
                             [{"weights": jnp.zeros((1, 2, 3))}])
    with pytest.raises(BatchesError, match="there are no words"):
        evaluate_tags(lambda *_, key: jnp.zeros((1, 2, 3)), None, None,
                      [{"tokens": 0, "attention_mask": 0, "labels": jnp.zeros((1, 2), int),
                        "weights": jnp.zeros((1, 2))}], ["O", "B-A", "I-A"])


MODEL = Decoder(DecoderConfig(vocab_size=64, hidden_size=32, layers=3, heads=4, kv_heads=2, head_size=8, mlp_size=64,
                              positions=64, rope=Rope(), tied=True))
B, T = 2, 12


def preferences() -> dict[str, jax.Array]:
    tokens = jnp.asarray(RNG.randint(0, 64, (B, 2, T)), jnp.int32)
    weights = jnp.ones((B, 2, T), jnp.float32).at[:, :, :5].set(0.0).at[1, 1, 9:].set(0.0)
    return {"tokens": tokens, "labels": jnp.where(weights > 0, tokens, -1), "weights": weights}


def log_probs(run: Any, batch: Any) -> jax.Array:
    flat = {name: x.reshape(2 * B, T) for name, x in batch.items()}
    return run(flat["tokens"], labels=flat["labels"], label_weights=flat["weights"]).log_probs.reshape(B, 2)


def dpo(model: Any, batch: Any, key: Any) -> Any:
    return losses.preferred(log_probs(model, batch), log_probs(model.base, batch), batch["weights"], beta=0.3)


def sft(model: Any, batch: Any, key: Any) -> Any:
    flat = {name: x.reshape(2 * B, T) for name, x in batch.items()}
    return model(flat["tokens"], labels=flat["labels"], label_weights=flat["weights"]).loss


def setting() -> Any:
    params = MODEL.init(jax.random.key(1))
    plan = jpeft.plan(MODEL.apply, params, (jnp.ones((1, 4), jnp.int32),), {"all-linear": jpeft.LoRA(rank=2, alpha=4)})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(2))
    return plan, trainable, frozen


@pytest.mark.slow
def test_dpo_in_a_training_step_needs_no_second_model() -> None:
    """A step takes the bytes of plain fine-tuning on the same batch, and the reference is the frozen base."""
    plan, trainable, frozen = setting()
    adapted, tx, batch = jpeft.adapt(MODEL.apply, plan), optax.adam(3e-2), preferences()
    state = create(trainable, tx, KEY)
    steps = {loss: jax.jit(make_train_step(adapted, loss, tx)).lower(state, frozen, batch).compile()
             for loss in (dpo, sft)}
    taken = [step.memory_analysis().argument_size_in_bytes for step in steps.values()]
    assert taken[0] == taken[1]
    held = sum(x.nbytes for x in jax.tree.leaves((trainable, state.opt_state, frozen, batch)))
    assert held <= taken[0] <= held + 64  # the step's number and its key besides
    found = []
    for _ in range(8):
        state, metrics = steps[dpo](state, frozen, batch)
        found.append({name: float(value) for name, value in metrics.items()})
    assert math.isclose(found[0]["loss"], math.log(2), rel_tol=1e-5)
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["margin"] > 0
    assert found[-1]["correct"] == found[-1]["count"] == B


@pytest.mark.slow
def test_the_reference_of_a_step_is_the_model_without_its_adapter() -> None:
    plan, trainable, frozen = setting()
    trainable, batch, tx = randomise(trainable, scale=0.1), preferences(), optax.sgd(0.1)
    base = log_probs(lambda *args, **named: MODEL.apply(frozen.base, *args, **named), batch)

    def loss_fn(model: Any, batch: Any, key: Any) -> Any:
        (given, want), here = batch, log_probs(model, batch[0])
        return jnp.sum(here), {"gap": jnp.abs(log_probs(model.base, given) - want).max(),
                               "moved": jnp.abs(here - want).max()}

    step = jax.jit(make_train_step(jpeft.adapt(MODEL.apply, plan), loss_fn, tx))
    metrics = step(create(trainable, tx, KEY), frozen, (batch, base))[1]
    assert float(metrics["gap"]) <= 1e-5 * float(jnp.abs(base).max())
    assert float(metrics["moved"]) > 1e-3 * float(jnp.abs(base).max())


@pytest.mark.slow
def test_dpo_is_that_of_torch(tmp_path: Any) -> None:
    """Log-probabilities, loss and gradients of a decoder whose weights train, written out in torch."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    params, batch = MODEL.init(jax.random.key(1)), preferences()
    jpeft.save_pretrained(tmp_path, MODEL, params)
    reference, policy = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval() for _ in range(2))
    rules = {"layers/attention/query/kernel|layers/mlp/down/kernel": jpeft.Full()}
    plan = jpeft.plan(MODEL.apply, params, (jnp.ones((1, 4), jnp.int32),), rules)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(2))
    moved = jax.tree.map(lambda t: t + 0.05 * jax.random.normal(jax.random.key(3), t.shape), trainable)
    names = {"layers/attention/query/kernel": "self_attn.q_proj", "layers/mlp/down/kernel": "mlp.down_proj"}
    weights = {path: [dict(policy.model.layers[i].named_modules())[name].weight for i in range(3)]
               for path, name in names.items()}
    with torch.no_grad():
        for path, parts in weights.items():
            for i, weight in enumerate(parts):
                kernel = np.asarray(moved[path]["w"][i])
                weight.copy_(torch.tensor(kernel.reshape(kernel.shape[0], -1).T.copy()))

    def sums(model: Any) -> Any:
        ids = torch.tensor(np.asarray(batch["tokens"])).reshape(2 * B, T).long()
        logs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        picked = logs.gather(-1, ids[:, 1:, None])[..., 0]
        return (picked * torch.tensor(np.asarray(batch["weights"])).reshape(2 * B, T)[:, 1:]).sum(-1).reshape(B, 2)

    mine, theirs = sums(policy), sums(reference).detach()
    margin = 0.3 * ((mine[:, 0] - mine[:, 1]) - (theirs[:, 0] - theirs[:, 1]))
    want = -torch.nn.functional.logsigmoid(margin).mean()
    want.backward()

    adapted = jpeft.adapt(MODEL.apply, plan)

    def scores(t: Any, f: Any, batch: Any, key: Any) -> Any:
        return log_probs(lambda *args, **named: adapted(t, f, *args, **named), batch)

    def before(f: Any, batch: Any) -> Any:
        return log_probs(lambda *args, **named: MODEL.apply(jpeft.base(plan, f), *args, **named), batch)

    loss_fn = losses.dpo(scores, before, beta=0.3)
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(moved, frozen, batch, KEY)
    close(scores(moved, frozen, batch, None), mine.detach().numpy())
    close(before(frozen, batch), theirs.numpy())
    close(loss, want.item())
    # What four log-probabilities differ by: as exact as they are, not as it is small.
    assert abs(float(metrics["margin"]) - margin.mean().item()) <= 1e-5 * 0.3 * float(theirs.abs().max())
    for path, parts in weights.items():
        for i, weight in enumerate(parts):
            kernel = np.asarray(grads[path]["w"][i])
            close(kernel.reshape(kernel.shape[0], -1).T, weight.grad.numpy())
