"""One method for the prompt, another while decoding."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from kvcompress.methods import Method, available, create, inner_stages, register
from kvcompress.pipeline import Stages
from kvcompress.when import Prefill


@register("prefill_decode", title="Prefill and decode", paper="of its two methods")
@dataclass(frozen=True)
class PrefillDecode(Method):
    """Cuts the prompt by one method and evicts by another while decoding, both down to the same budget.

    ``create("prefill_decode", budget=512, prefill="snapkv", decode="morphkv")``: SnapKV's prompt, then MorphKV. What the second
    method measures starts with the prompt as it does on its own (column sums of H2O, the last rows of MorphKV). After a prompt whose
    heads keep different counts (AdaKV), each head stays at its own, in a `FixedCache` only.

    Attributes:
        prefill: the method that cuts the prompt, by name or built, with its layer budgets; its own budget is replaced if they
            are equal ones.
        decode: a method that evicts while decoding, by name or built.
    """

    prefill: Method | str = "snapkv"
    decode: Method | str = "morphkv"

    def stages(self) -> Stages:
        first = inner_stages(self.name, self.prefill, self.budget)
        later = (_evicting(self.decode, self.budget) if isinstance(self.decode, str) else self.decode).stages()
        if isinstance(later.when, Prefill):
            raise ValueError(
                f"{self.name}: decode must be a method that evicts while decoding, got {self.decode}, which cuts the prompt only"
            )
        if later.attend is not None or later.decode is None:
            raise ValueError(
                f"{self.name}: decode must be a method that measures attention or ranks by keys while decoding, got {self.decode}, "
                "which goes by position and needs a prompt cut by itself"
            )
        return replace(
            first, when=replace(later.when, lazy=False), decode=later.decode, reselect=later.reselect or later.select
        )


def _evicting(name: str, budget: int | float) -> Method:
    method = available().get(name)
    switch = method is not None and any(field.name == "decode" for field in fields(method))
    return create(name, budget=budget, decode=True) if switch else create(name, budget=budget)
