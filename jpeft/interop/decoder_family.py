"""How the checkpoint of a causal language model is read and written: what its family's tables mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jpeft.errors import ModelConfigError
from jpeft.interop import hflayers, hfrope
from jpeft.interop.checkpoint import Names, Row
from jpeft.interop.family import Family
from jpeft.interop.hfconfig import ConfigTable
from jpeft.interop.tensors import Tensors, same
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_config import TASKS, DecoderConfig
from jpeft.models.rope import Rope

_BUFFERS = (r".*rotary_emb\.inv_freq", r".*\.(attn|attention)\.(bias|masked_bias)")
_GROUPS = (("rope", "local_rope"), ("window", "local", "unrotated"))


@dataclasses.dataclass(frozen=True)
class DecoderFamily(Family):
    """One `model_type`.

    Attributes:
        stem: of the names of its architectures.
        config: what the plain keys of `config.json` mean; `_plain` makes fields of `DecoderConfig` of it.
        body: name table of the decoder; a model need not have all of its leaves.
        base: prefix of the decoder's tensors in a model that has a head.
        out: stored name of the head.
        rope: how `config.json` says the rotary positions: "plain", "none", "partial" (Phi-3), "neox", "two" (Gemma 3).
        theta: of the rotary positions where it does not say; of "two", those of the layers without a window.
        windows: how it says which layers have a window: a key of `hflayers.KEYS`.
        window: the window where it does not say.
        every: of the windows "every".
        whole: whether transformers demands that the heads divide the width.
        suffixes: of the architecture of each task.
    """

    stem: str
    config: ConfigTable
    body: tuple[Row, ...]
    base: str = "model."
    out: str = "lm_head.weight"
    rope: str = "plain"
    theta: float = 10000.0
    windows: str = "none"
    window: int | None = None
    every: int = 0
    suffixes: tuple[str, str, str] = ("ForCausalLM", "Model", "ForSequenceClassification")

    model: ClassVar[type[Decoder]] = Decoder
    tasks: ClassVar[tuple[str, ...]] = TASKS
    default: ClassVar[str] = "causal-lm"
    head_leaf: ClassVar[str] = "classifier/kernel"
    fresh: ClassVar[tuple[str, ...]] = ("classifier",)
    saved: ClassVar[tuple[str, ...]] = TASKS
    rates: ClassVar[tuple[str, ...]] = ("dropout", "attention_dropout", "embedding_dropout")

    @property
    def classes(self) -> Mapping[str, str]:  # type: ignore[override]
        return {task: self.stem + suffix for task, suffix in zip(TASKS, self.suffixes, strict=True)}

    def names(self, config: DecoderConfig) -> Names:
        head = {"causal-lm": () if config.tied else (Row("lm_head/kernel", f"!{self.out}", "in"),), "hidden": (),
                "classification": (Row("classifier/kernel", "!score.weight", "in"),)}[config.task]
        prefixes = ("", self.base) if config.task == "hidden" else (self.base, "")
        # A tied head that is stored all the same has been compared with the word table by `adjusted`.
        unread = (*_BUFFERS, *((r"lm_head\.weight", r"embed_out\.weight") if config.tied else ()))
        renamed = ((r"^lm_head\.weight$", self.out),) if self.out != "lm_head.weight" else ()
        others = {"causal-lm": (r"score\..*",), "hidden": (r"score\..*", r"lm_head\..*", r"embed_out\..*"),
                  "classification": (r"lm_head\..*", r"embed_out\..*")}[config.task]
        return Names((*self.body, *head), prefixes, renamed, unread, others)

    def read(self, raw: Mapping[str, Any], where: str, **fields: Any) -> DecoderConfig:
        raw = self._one_name(raw)
        plain = self._plain(self._table.read(raw, where))
        which = hflayers.read(self.windows, raw, where, plain["layers"], self.window, self.every)
        ropes = self._ropes(raw, where, plain)
        return DecoderConfig(**{**plain, **which._asdict(), **ropes, **fields})

    def _one_name(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Give the number of experts, which has two names, the one of the table."""
        names = ("num_experts", "num_local_experts")
        ours = next((name for name in names if name in self._table.keys), None)
        return {ours if ours and name in names and ours not in raw else name: value for name, value in raw.items()}

    @property
    def _table(self) -> ConfigTable:
        rope = {"none": frozenset(), "neox": (hfrope.KEYS - {"rope_theta"}) | {"rotary_emb_base", "rotary_pct"},
                "partial": hfrope.KEYS | {"partial_rotary_factor", "original_max_position_embeddings"},
                "two": hfrope.KEYS | {"rope_local_base_freq"}}.get(self.rope, hfrope.KEYS)
        seen = self.config.harmless | rope | hflayers.KEYS[self.windows] | {"auto_map"}
        fixed = {} if self.rope == "partial" else {"partial_rotary_factor": (1.0, None)}
        return dataclasses.replace(self.config, harmless=seen, fixed={**fixed, **self.config.fixed})

    def _plain(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Turn what the keys say into fields of `DecoderConfig`."""
        if fields["head_size"] is None:
            fields["head_size"] = fields["hidden_size"] // fields["heads"]
        if fields["mlp_size"] is None:
            fields["mlp_size"] = 4 * fields["hidden_size"]
        bias = fields.pop("bias", None)
        if bias is not None:
            fields.update(qkv_bias=bias, out_bias=bias)
        scalar = fields.pop("query_scalar", None)
        if scalar is not None:
            fields["scale"] = float(scalar) ** -0.5
        if not fields.pop("scaled", True):
            fields["scale"] = 1.0
        if fields.pop("embed_by_width", False):
            fields["embed_scale"] = float(fields["hidden_size"]) ** 0.5
        if self.stem == "Gemma" and fields["activation"] == "gelu":
            fields["activation"] = "gelu_pytorch_tanh"
        if self.rope == "neox":
            fields["embedding_dropout"] = fields["dropout"]
        return fields

    def _ropes(self, raw: Mapping[str, Any], where: str, plain: Mapping[str, Any]) -> dict[str, Rope | None]:
        said: Any = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        positions = plain["positions"]

        def one(said: Any, theta: Any, **more: Any) -> Rope:
            if not isinstance(said, dict) or isinstance(theta, bool) or not isinstance(theta, int | float):
                raise ModelConfigError(f"{where}: rope_scaling = {said!r} and rope_theta = {theta!r} must be an object "
                                       "and a number")
            return hfrope.read(said, where, theta=theta, positions=positions, **more)

        if self.rope == "none":
            return {"rope": None}
        theta = raw.get("rotary_emb_base" if self.rope == "neox" else "rope_theta", self.theta)
        if self.rope == "neox":
            return {"rope": one(said, theta, fraction=raw.get("rotary_pct", 0.25))}
        if self.rope == "partial":
            renamed = {**said, "rope_type": said.get("rope_type", said.get("type", "default"))}
            renamed["rope_type"] = "longrope" if renamed["rope_type"] in ("su", "yarn") else renamed["rope_type"]
            return {"rope": one(renamed, theta, fraction=raw.get("partial_rotary_factor", 1.0),
                                original=raw.get("original_max_position_embeddings", 4096))}
        if self.rope == "two":
            both = raw.get("rope_parameters") or {}
            if not set(both) <= {"full_attention", "sliding_attention"}:
                raise ModelConfigError(f"{where}: rope_parameters has the keys {sorted(both)}, must be full_attention "
                                       "and sliding_attention")
            wide = {**(both.get("full_attention") or {}), **(raw.get("rope_scaling") or {})}
            return {"rope": one(wide, theta),
                    "local_rope": one(both.get("sliding_attention") or {}, raw.get("rope_local_base_freq", 10000.0))}
        rope = one(said, theta)
        if rope.fraction != 1:
            raise ModelConfigError(f"{where}: partial_rotary_factor = {rope.fraction} is not implemented for "
                                   f"{self.stem}, only 1.0")
        return {"rope": rope}

    def write(self, raw: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
        says = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        scalar = round((config.scale or config.head_size**-0.5) ** -2, 6)
        says.update(bias=config.qkv_bias, scaled=config.scale != 1.0,
                    query_scalar=int(scalar) if scalar == int(scalar) else scalar)
        fresh = "num_hidden_layers" not in raw and "n_layer" not in raw
        old = None if fresh else self.read(raw, "the model's own config.json", task="hidden")
        new = self._table.write(self._one_name(raw), says)
        for group, keys in zip(_GROUPS, (self._rope_keys(config), self._window_keys(config)), strict=True):
            if old is None or any(getattr(old, name) != getattr(config, name) for name in group):
                new = {**{k: v for k, v in new.items() if k != "rope_parameters" or group is not _GROUPS[0]}, **keys}
        again = self.read(new, "the config.json to write", task=config.task, labels=config.labels)
        differs = [name for name, value in says.items()
                   if hasattr(again, name) and getattr(again, name) != value]
        if differs:
            raise ModelConfigError(f"a {self.stem} cannot have {', '.join(f'{n} = {says[n]!r}' for n in differs)}; "
                                   "write it as another model_type")
        return new

    def _rope_keys(self, config: DecoderConfig) -> dict[str, Any]:
        if self.rope == "none" or config.rope is None:
            return {}
        keys: dict[str, Any] = {"rope_scaling": hfrope.write(config.rope)}
        if self.rope == "neox":
            return {**keys, "rotary_emb_base": config.rope.theta, "rotary_pct": config.rope.fraction}
        keys["rope_theta"] = config.rope.theta
        if self.rope == "partial":
            keys["partial_rotary_factor"] = config.rope.fraction
            if config.rope.original:
                keys["original_max_position_embeddings"] = config.rope.original
        elif self.rope == "two":
            keys["rope_local_base_freq"] = config.local_rope.theta if config.local_rope else config.rope.theta
        return keys

    def _window_keys(self, config: DecoderConfig) -> dict[str, Any]:
        which = hflayers.Which(config.window, config.local, config.unrotated)
        return hflayers.write(self.windows, which, config.layers)

    def adjusted(self, config: DecoderConfig, held: Mapping[str, Any], tensors: Tensors) -> DecoderConfig:
        """Untie the head of a checkpoint that says it is tied and yet stores another one, as transformers does."""
        heads = [name for name in ("lm_head.weight", "embed_out.weight") if name in tensors.infos]
        if not config.tied or config.task != "causal-lm" or not heads:
            return config
        words = next(row.stored for row in self.body if row.leaf == "embed/embedding")
        table = next((prefix + words for prefix in (self.base, "") if prefix + words in tensors.infos), None)
        tied = table is None or same(tensors, heads[0], table)
        return config if tied else dataclasses.replace(config, tied=False)
