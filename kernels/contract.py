"""A contract declares one op once: its meaning in plain torch, its cost, its inputs, and the kernels that provide it.

Tests, microbenchmarks, the compiler's lowering and eager calls all read this one record. The file of an op reads, in
order: meaning, cost, inputs, Triton kernel, launch. What is registered beside the meaning names the parameters that it
reads of it (by_name.py). Providers are chosen by one rule (`Contract.choose`), for eager calls and for lowering alike;
a provider asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import tuned
from .by_name import by_name
from .draw import Draw
from .provider import Build, Provider
from .signature import Signature

__all__ = ["CONTRACTS", "NAMESPACE", "Build", "Contract", "Cost", "Provider", "contract", "contract_of", "rows_of"]
NAMESPACE = "seamwise"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
CONTRACTS: dict[str, Contract] = {}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call must move and compute at least: `bytes` read plus written, `flops` (a fused multiply-add is 2)."""

    bytes: int
    flops: int


@dataclass(eq=False, repr=False, kw_only=True)
class Contract:
    """One op: callable like a function, and the record that everything else reads.

    meaning  plain torch; it is the definition, the fake (shape) function, the oracle and the fallback provider
    op       the registered `torch.ops.seamwise.<name>` overload that appears in graphs
    seam     True for an op that runs eagerly between compiled pieces (attention, its KV write)
    mutates  names of the arguments the op writes (only a seam may have any)
    opaque   True for an op that a compiler gains nothing from looking into (a GEMM over a packed layout)
    fake     the shape function: the meaning, unless another is given
    flops    of one call, a function of its arguments
    signature     what its arguments must be, whichever provider serves them (signature.py)
    reads_values  True where the meaning looks at values, or waits for other ranks: a tape records its calls as wholes
    """

    name: str
    meaning: Callable[..., Any]
    signature: Signature
    seam: bool
    mutates: tuple[str, ...]
    opaque: bool
    fake: Callable[..., Any]
    flops: Callable[..., int]
    reads_values: bool
    op: Any = None
    providers: list[Provider] = field(default_factory=list)
    _cost: Callable[..., Cost] | None = None
    _inputs: Callable[..., tuple[Any, ...]] | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int] | list[Any]] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    _builds: Callable[[str], Iterable[Build]] | None = None
    _key: Callable[..., Sequence[Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.op(*args, **kwargs)

    def run(self, provider: str, *args: Any) -> Any:
        """Call one provider by name. Raises ValueError when it does not exist or cannot serve these arguments."""
        return self.choose(args, provider).call(*args)

    def direct(self, *args: Any) -> Any:
        """Call the provider itself, for kernels composed of others: an op of torch costs 6 to 20 us more a call."""
        return self.choose(args).call(*args)

    def why_not(self, provider: Provider, args: Sequence[Any]) -> str | None:
        """Return why a provider cannot serve `args`, or None. Raises ValueError for arguments the op does not take."""
        return provider.why_not(_device(args), args, self.signature.judge(*args))

    def choose(self, args: Sequence[Any], requested: str | None = None) -> Provider:
        """Return the provider for `args`: the requested one, else the first that accepts them.

        First stands the measured winner (`tuned_by`), then the others as they were registered, last the meaning itself,
        as provider "torch", which accepts everything. Raises ValueError for arguments that the op does not take.
        """
        device, loose = _device(args), self.signature.judge(*args)
        if requested is None:
            providers: Iterable[Provider] = self.providers
            if self._key is not None:
                fastest = self._winner(args)
                providers = sorted(providers, key=lambda p: p.name != fastest)
            return next(p for p in providers if p.why_not(device, args, loose) is None)
        for provider in self.providers:
            if provider.name == requested:
                if reason := provider.why_not(device, args, loose):
                    raise ValueError(f"{self.name}: provider {requested!r} cannot serve this call: {reason}")
                return provider
        names = ", ".join(p.name for p in self.providers)
        raise ValueError(f"{self.name}: no provider named {requested!r}; it has: {names}")

    def provider(
        self, name: str, *, refuses: Callable[..., str | None] | Sequence[Callable[..., str | None]] = (), **fields: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as a provider, before the meaning and after earlier registrations.

        `refuses`, one function or several, name the parameters that they read; the first reason counts. The fields are
        Provider's.
        """
        accept = by_name(self.meaning, *((refuses,) if callable(refuses) else refuses))

        def register(call: Callable[..., Any]) -> Callable[..., Any]:
            entry = Provider(name=name, call=call, refuses=accept, **fields)
            self.providers.insert(len(self.providers) - 1, entry)
            return call

        return register

    def tuned_by(self, key: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        """Register `key(…) -> (rows, *shape)`, by which tables of measured winners are read (tuned.py).

        Where rows are symbolic, and so the winner is not known yet, the call goes to a provider "measured" that
        chooses at each call.
        """
        self._key = by_name(self.meaning, key)

        def refuses(*args: Any) -> str | None:
            return None if self._winner(args) == "measured" else "the rows are known, or nothing was measured"

        self.provider("measured", refuses=refuses, defers=True)(lambda *args: self.choose(args).call(*args))
        return key

    def _winner(self, args: Sequence[Any]) -> str | None:
        if self._key is None:
            return None
        name = tuned.winner(self.name, _device(args), self._key(*args))
        if name is not None and all(p.name != name for p in self.providers):
            raise ValueError(f"{self.name}: the measured winner {name!r} is none of its providers; measure again")
        return name

    def costs(self, function: Callable[..., Cost]) -> Callable[..., Cost]:
        """Register `cost(…) -> Cost`, for an op that moves other than each argument and result once."""
        self._cost = by_name(self.meaning, function)
        return function

    def inputs(
        self, *, examples: Iterable[Mapping[str, Any]], shapes: Mapping[str, Mapping[str, Any]] | None = None,
        sizes: Mapping[str, tuple[int, int] | list[Any]] | None = None, rows: tuple[int, ...] = (),
        dtypes: tuple[torch.dtype, ...] = (),
    ) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., tuple[Any, ...]]]:  # fmt: skip
        """Register `make(draw, sizes…) -> args`, whose tensors come from `draw` (draw.py).

        examples  small edge cases, for tests
        shapes    named shapes of real models, for the microbenchmarks
        sizes     what property tests draw: an inclusive range (low, high) or a list of choices
        rows      indices of the arguments whose first dimension is the row; every result then has rows first, and a
                  row's result does not depend on the other rows, in bits
        dtypes    those that the generic tests draw, where not all of them have a bound that these know
        """

        def register(make: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
            self._inputs, self.examples, self.shapes = make, tuple(examples), dict(shapes or {})
            self.sizes, self.rows, self.dtypes = dict(sizes or {}), rows, dtypes
            return make

        return register

    def builds(self, made: Callable[[str], Iterable[Build]] | Iterable[Build]) -> Any:
        """Register every compilation of its Triton kernels that real shapes ask for, or a function of the dtype."""
        every = made if callable(made) else tuple(made)
        self._builds = every if callable(every) else lambda dtype: every
        return made

    def triton_builds(self, dtype: str) -> Iterable[Build]:
        """Return the Triton compilations of `dtype` ("bf16" or "fp32"); none where no Triton provider is registered."""
        if self._builds is None:
            assert not any(p.triton for p in self.providers), f"{self.name}: its file registers no builds"
            return ()
        return self._builds(dtype)

    def cost(self, *args: Any, results: Any = None) -> Cost:
        """Return what a call moves and computes: each argument and result once, where nothing else is registered.

        Results that are known already need not be inferred from the arguments, which takes a millisecond.
        """
        if self._cost is not None:
            return self._cost(*args)
        if results is None:
            results = self.fake(*tree_map_only(Tensor, lambda t: t.to("meta"), args))
        moved = sum(t.nbytes for t in tree_leaves((args, results)) if isinstance(t, Tensor))
        return Cost(bytes=moved, flops=self.flops(*args))

    def make_inputs(
        self, sizes: Mapping[str, Any], *, dtype: torch.dtype, device: str, seed: int = 0
    ) -> tuple[Any, ...]:
        """Draw one argument tuple of the given sizes, reproducibly."""
        return self.drawn(Draw(dtype, device, seed), **sizes)

    def drawn(self, draw: Draw, **sizes: Any) -> tuple[Any, ...]:
        """Draw one argument tuple, as part of another op's inputs."""
        assert self._inputs is not None, f"{self.name}: its file registers no inputs"
        return self._inputs(draw, **sizes)


def contract(
    *, args: Mapping[str, str] | None = None, limits: Callable[..., str | None] | Sequence[Callable[..., Any]] = (),
    seam: bool = False, opaque: bool = False, mutates: tuple[str, ...] = (),
    fake: Callable[..., Any] | None = None, reads_values: bool = False, flops: Callable[..., int] = lambda *args: 0,
) -> Callable[[Callable[..., Any]], Contract]:  # fmt: skip
    """Turn a plain torch function with annotated arguments into a `Contract` and register its op.

    args    what names do not say of the tensors' shapes and dtypes, as signature.py has it
    limits  one function or several that return what else is wrong with the arguments, for every provider, or None
    fake    replaces the meaning for shape propagation, where the meaning reads values (a seam's block table) or is slow
    The op must return fresh tensors, never views of its arguments. `limits`, `fake` and `flops` name the parameters
    that they read.
    """

    def declare(meaning: Callable[..., Any]) -> Contract:
        name = meaning.__name__
        if mutates and not seam:
            raise ValueError(f"{name}: only a seam may write its arguments, got mutates={mutates}; return new tensors")
        schema = torch.library.infer_schema(meaning, mutates_args=mutates)
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        limited = by_name(meaning, *((limits,) if callable(limits) else limits))
        record = Contract(
            name=name, meaning=meaning, signature=Signature(meaning, args or {}, limited), seam=seam,
            mutates=mutates, opaque=opaque, flops=by_name(meaning, flops),
            fake=meaning if fake is None else by_name(meaning, fake), reads_values=reads_values,
        )  # fmt: skip

        def infer(*given: Any) -> Any:
            record.signature.check(*given)
            return record.fake(*given)

        record.providers.append(Provider(name="torch", call=meaning, strided=True))

        def called(*given: Any) -> Any:
            result = record.choose(given).call(*given)
            # a provider may say "nothing changes" by giving an argument back; an op's results are its caller's own
            given_back = isinstance(result, Tensor) and any(result is one for one in given)
            return result.clone() if given_back else result

        _LIBRARY.impl(name, called, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", infer, lib=_LIBRARY)
        record.op = getattr(getattr(torch.ops, NAMESPACE), name).default
        record.__doc__ = meaning.__doc__
        CONTRACTS[name] = record
        return record

    return declare


def contract_of(target: object) -> Contract | None:
    """Return the contract whose op is `target` (an FX node's target), or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return CONTRACTS.get(target._schema.name.split("::")[1])
    return None


def rows_of(x: Tensor) -> tuple[int, int]:
    """Return how many rows x has, of one dimension or more, and how far apart they lie."""
    return x.numel() // x.shape[-1], x.stride(-2) if x.dim() > 1 else 0


def _device(args: Sequence[Any]) -> str:
    """Return the type of the device of the first tensor among the arguments."""
    return next(a for a in args if isinstance(a, Tensor)).device.type
