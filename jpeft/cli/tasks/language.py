"""What the tasks of models that write have in common: the model computes the loss, perplexity judges it."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax

from jpeft.cli.config import JobConfig
from jpeft.cli.sections import GenerateConfig
from jpeft.cli.tasks import answers
from jpeft.cli.tasks.answers import Question
from jpeft.cli.tasks.base import Adapted, Apply, Loaded, Metrics, Task, Tested
from jpeft.core import transform
from jpeft.core.method import Call
from jpeft.core.plan import Plan
from jpeft.train import losses
from jpeft.train.evaluate import evaluate_lm
from jpeft.train.losses import Penalty, model_inputs
from jpeft.train.step import LossFn

if TYPE_CHECKING:
    from jpeft.cli.runs import RunSummary

NEW = 64  # tokens that `predict` writes at most where the job does not say


class Language(Task):
    """A task whose loss is the mean over tokens, computed by the model."""

    monitor: ClassVar[str] = "loss"
    mode: ClassVar[Literal["max", "min"]] = "min"

    def labels(self, job: JobConfig) -> None:
        return None

    def base(self, loaded: Loaded) -> Apply:
        def loss(params: Any, tokens: Any, key: Any = None, **named: Any) -> Any:
            return loaded.model.apply(params, tokens, **named, key=key).loss

        return loss

    def apply(self, loaded: Loaded, plan: Plan | None) -> Apply:
        """Return `(trainable, frozen, batch, key=None) -> loss`."""
        plain = self.base(loaded)
        adapted = None if plan is None else transform.adapt(plain, plan)

        def apply(trainable: Any, frozen: Any, batch: Any, key: Any = None) -> Any:
            tokens, named = batch["tokens"], model_inputs(batch)
            if adapted is None:
                return plain(frozen, tokens, **named, key=key)
            if key is None:
                return adapted(trainable, frozen, tokens, **named)
            mine, theirs = jax.random.split(key)
            return adapted(trainable, frozen, tokens, **named, key=mine, peft=Call(key=theirs))

        return apply

    def loss(self, loaded: Loaded, apply: Apply, penalty: Penalty | None) -> LossFn:
        return losses.causal_lm(apply, penalty=penalty)

    def evaluate(self, loaded: Loaded, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Metrics:
        return evaluate_lm(apply, trainable, frozen, batches)

    def measured(self, adapted: Adapted, made: Any, compare: bool) -> tuple[Metrics, Metrics]:
        """Return loss, perplexity and tokens of some batches, with the adapter and (if wanted) without."""
        loaded = adapted.loaded

        def batches() -> Iterable[Any]:
            return (made.make(0, i) for i in range(len(made)))

        after = self.evaluate(loaded, adapted.apply, adapted.trainable, adapted.frozen, batches())
        if not compare:
            return after, {}
        return after, self.evaluate(loaded, loaded.unadapted, None, loaded.params, batches())

    def answered(self, adapted: Adapted, questions: Sequence[Question], known: Sequence[str], tested: Tested,
                 compare: bool) -> Tested:
        """Return a test with the answers to some questions: how many are right, and samples.

        Args:
            adapted: the model.
            questions: prompts and right answers.
            known: the answers of the training rows, the most frequent of which is the baseline; none: nothing is
                right or wrong, as the texts go on in many ways.
            tested: what is known so far.
            compare: answer without the adapter too.
        """
        loaded = adapted.loaded
        config = loaded.config.test.generate or GenerateConfig()
        prompts = [question.prompt for question in questions]
        plain = answers.plain(loaded)
        before = answers.answers(plain, prompts, config) if compare else None
        trained = answers.trained(adapted, plain)
        after = answers.answers(trained, prompts, config)
        tested = tested._replace(notes=(*tested.notes, *trained.notes))
        shown = answers.samples(loaded.tokenizer, questions, before or after, after, config.samples,
                                f"{loaded.config.name}: answers before and after training")
        if not known:
            return tested._replace(samples=shown)
        answer, baseline = answers.most_frequent(known, questions)
        cut = sum(one.reason == "length" for one in after)
        notes = (f"the most frequent answer of the training rows is {answers.shown(answer)!r}",
                 *([f"{cut} of {len(after)} answers were ended by test.generate.max_new_tokens = "
                    f"{config.max_new_tokens}"] if cut else []))
        return Tested({**tested.after, **answers.right(after, questions)},
                      {**tested.before, **(answers.right(before, questions) if before else {})},
                      baseline, shown, (*tested.notes, *notes), answers.hits(after, questions))

    @abc.abstractmethod
    def prompts(self, loaded: Loaded, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids that the model reads for texts of a user."""

    def predict(self, adapted: Adapted, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        config = adapted.loaded.config.test.generate or GenerateConfig(max_new_tokens=NEW)
        trained = answers.trained(adapted)
        wrote = answers.answers(trained, self.prompts(adapted.loaded, texts), config)
        cut = sum(one.reason == "length" for one in wrote)
        notes = [*trained.notes, *([f"{cut} of {len(texts)} answers were ended after {config.max_new_tokens} tokens"]
                                   if cut else [])]
        return [f"{answers.shown(one.text)}\t{answers.shown(text)}" for one, text in
                zip(wrote, texts, strict=True)], notes

    def headline(self, metrics: Mapping[str, float]) -> str:
        exact = f", exact match {metrics['exact_match']:.3f}" if "exact_match" in metrics else ""
        return f"perplexity {metrics['perplexity']:.4g}{exact}"

    def line(self, metrics: Mapping[str, float]) -> str:
        said = f"perplexity {metrics['perplexity']:.4f}, loss {metrics['loss']:.4f}, {metrics['count']:,.0f} tokens"
        if "dialogue_perplexity" in metrics:
            said += (f"; dialogue alone {metrics['dialogue_perplexity']:.4f}, loss {metrics['dialogue_loss']:.4f}, "
                     f"{metrics['dialogue_count']:,.0f} tokens")
        if "exact_match" in metrics:
            said += f"; exact match {metrics['exact_match']:.4f} of {metrics['answers']:,.0f} answers"
        return said

    def result(self, summary: RunSummary) -> list[tuple[str, str]]:
        new, old = summary.test, summary.before

        def change(name: str, form: str) -> str:
            return f"{old[name]:{form}} before, {new[name]:{form}} after" if name in old else f"{new[name]:{form}}"

        lines = [("test perplexity", f"{change('perplexity', '.2f')}, on {new['count']:,.0f} tokens; best step "
                                     f"{summary.best_step} of {summary.steps}"),
                 ("test loss", f"{change('loss', '.4f')}, per token")]
        if "dialogue_perplexity" in new:
            lines.append(("dialogue alone", f"perplexity {change('dialogue_perplexity', '.2f')}, on "
                                            f"{new['dialogue_count']:,.0f} tokens"))
        if "exact_match" in new:
            most = summary.baseline["exact_match"]
            lines.append(("exact match", f"{change('exact_match', '.4f')}, on {new['answers']:,.0f} rows; the most "
                                         f"frequent answer {most:.4f}"))
        return lines
