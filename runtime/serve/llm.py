"""`LLM`: a model, offline, in two lines, with vLLM's names."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from seamwise import caches
from seamwise.compile.check.batch_invariant import check_batch_invariant
from seamwise.extras import pip_install
from seamwise.runtime.build.arguments import named_arguments, options_of
from seamwise.runtime.build.auto_options import entry_of
from seamwise.runtime.build.packs import model_of
from seamwise.runtime.build.runner_config import check_options
from seamwise.runtime.distributed.group import meet
from seamwise.runtime.engine.adapters import Adapters
from seamwise.runtime.engine.drafting import Drafting
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.executor import InProcess, starts_engines, starts_ranks
from seamwise.runtime.engine.executor_control import ModelControl
from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.kv.offload_options import make_offload
from seamwise.runtime.runner.profile import ProfilerConfig
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.runner.sparse_kv import Pick
from seamwise.runtime.sampling.generation_config import default_params, read_generation_config
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.report import check_mode
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.policies import find_policy
from seamwise.runtime.scheduler.replay import record_in
from seamwise.runtime.speculation.config import SpeculativeConfig
from seamwise.runtime.speculation.drafter import find_drafter
from seamwise.runtime.speculation.model_drafter import ModelDrafter
from seamwise.runtime.text.tokenizer import Tokenizer, has_tokenizer
from seamwise.runtime.weights.hub import resolve_model

from .cache_memory import CacheMemory
from .embed import Pools
from .prompt_batch import Prompt, asked, read_prompt, run

_INSTEAD = {  # arguments of vLLM's generate and chat, and what there is instead
    "prompt_token_ids": 'give prompts as {"prompt_token_ids": […]}',
    "mm_processor_kwargs": "models are served as text",
    **dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n"), "give SamplingParams(…)"),
}


class LLM(ModelControl, Pools):
    """Loads a model and generates for lists of prompts.

    model    a Hugging Face directory, a GGUF file, a pack of `seamwise compile`, or a hub id (downloaded by
             huggingface_hub), "org/name:Q4_0" for one of several GGUF files
    tokenizer  another directory or GGUF file to take the tokenizer from
    skip_tokenizer_init  read no tokenizer: prompts are token ids, and outputs have no text (detokenize=False)
    dtype    "auto" (the checkpoint's), "float32", "bfloat16" or "float16"
    device   "auto" (CUDA when there is one), "cpu", "cuda[:n]"
    max_model_len  longest request, prompt and output together; default: what the model allows; "auto": what of that
                   the KV cache has room for
    max_num_seqs, max_num_batched_tokens  sequences that run at once; tokens a step computes
    scheduling_policy  "fcfs", "priority", "fair", "predictive", "response_ratio", "cache_aware" or an installed one
    async_scheduling  plan a step while the one before it runs; outputs are the same without
    long_prefill_token_threshold, scheduler_reserve_full_isl, watermark  see SchedulerConfig
    generation_config  where the options of requests without any come from: "auto" (the model's generation_config.json),
                   "vllm" (SamplingParams' own defaults, and config.json's end of sequence), or a directory
    logprobs_mode  what log probabilities are of: "raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"
    kv_cache_memory_bytes  memory for the KV cache; default: what max_num_seqs requests of max_model_len need, at most
                   what is left of gpu_memory_utilization (0.9) of a GPU's memory, 1/4 of the machine's on a CPU
    num_gpu_blocks_override  blocks of the KV cache, instead
    kv_offloading_size  GiB of the machine's memory for blocks that the KV cache evicts, to be loaded instead of
                   computed again; kv_offloading_backend: "native"
    kv_offloading_folder, kv_offloading_folder_size  a folder, and GiB of it, for blocks that are evicted from there,
                   and for all of them at shutdown(): a later start with the same model finds them
    kv_offloading_min_tokens  fewer tokens than this are computed rather than loaded (32)
    enable_sleep_mode  False: sleep() is refused
    enable_lora    requests may have adapters (lora_request): max_loras in a step, max_cpu_loras in memory, PEFT's files
    speculative_config  guess tokens that a step of the model then confirms, by vLLM's names, as {"method": "ngram",
                   "num_speculative_tokens": 4, "prompt_lookup_max": 5}, {"model": "a smaller one"} or {"method":
                   "first_layers", "num_layers": 6}: outputs are the same, and come faster where guesses stand; see
                   runtime/speculation/config.py
    sparse_kv      a function that picks, for each layer and step, the pages of the KV cache that attention reads; see
                   runtime/runner/sparse_kv.py. Recorded are then pieces between seams (cudagraph_mode "piecewise")
    batch_invariant  True: refused by name where a row may have other bits in another batch; on a CPU, our kernels' rows
                   have the same bits in any batch, chunking, order and preemption, asked for or not
    profiler_config  {"profiler": "torch", "torch_profiler_dir": "traces"}: where start_profile() … stop_profile() write
    decisions_dir  a folder for what the scheduler decides, a file for each engine and start: `seamwise replay FILE`
                   plans it all again and says whether it is the same
    data_parallel_size  engines, each a process with requests of its own (`seamwise[serve]`) and all of the model, or
                   with enable_expert_parallel its share of the experts; torchrun's processes are that many already
    data_parallel_rank, data_parallel_address, data_parallel_timeout_s  which of them this process is, the file where
                   those that share out experts meet, how long they wait for each other: given by what starts them
    worker_extension_cls  class whose methods collective_rpc calls on every worker, or its "package.module.Class"
    model_impl     "transformers": the checkpoint's own class; "vllm", "auto": Seamwise's definition where there is one
    cache_dir  where compiled kernels, packs and tokenizers are kept from now on, in this process; default:
               $XDG_CACHE_HOME/seamwise, else ~/.cache/seamwise
    **options  further fields of RunnerConfig: entry, hf_overrides, load_format, block_size, enforce_eager,
               quantization, kv_cache_dtype, pipeline, pack_dir, offline, tensor_parallel_size

    distributed_executor_backend  with tensor_parallel_size above 1: "mp": this process decides and starts one for each
                   rank (`seamwise[serve]`); "external_launcher": it is one of as many (`torchrun --nproc-per-node N`)
                   that make the same calls and get the same outputs. Default: what started it
    """

    def __init__(
        self, model: str | Path, *, tokenizer: str | Path | None = None, dtype: str | torch.dtype = "auto",
        device: str = "auto", max_model_len: int | str | None = None, seed: int = 0, max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048, enable_prefix_caching: bool = True,
        gpu_memory_utilization: float | None = None, kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None, scheduling_policy: str = "fcfs", async_scheduling: bool = True,
        long_prefill_token_threshold: int = 0, scheduler_reserve_full_isl: bool = True, watermark: float = 0.0,
        logprobs_mode: str = "raw_logprobs", generation_config: str = "auto", skip_tokenizer_init: bool = False,
        kv_offloading_size: float | None = None, kv_offloading_backend: str | None = None,
        kv_offloading_folder: str | Path | None = None, kv_offloading_folder_size: float | None = None,
        kv_offloading_min_tokens: int | None = None,
        enable_sleep_mode: bool | None = None, max_cpu_loras: int | None = None,
        speculative_config: Mapping[str, Any] | SpeculativeConfig | None = None,
        profiler_config: Mapping[str, Any] | ProfilerConfig | None = None, batch_invariant: bool | None = None,
        decisions_dir: str | Path | None = None, sparse_kv: Pick | None = None,
        worker_extension_cls: str | type | None = None, model_impl: str = "auto",
        distributed_executor_backend: str | None = None, trust_remote_code: bool = False,
        cache_dir: str | Path | None = None, data_parallel_size: int = 1, data_parallel_rank: int | None = None,
        data_parallel_address: str | None = None, data_parallel_timeout_s: float = 300.0, **options: Any,
    ) -> None:  # fmt: skip
        given = {
            name: value for name, value in {**locals(), **options}.items() if name not in ("self", "model", "options")
        }
        ranks = starts_engines(data_parallel_size, data_parallel_rank, options.get("enable_expert_parallel", False))
        self.takes_steps_together = ranks == "joined"
        if ranks == "joined":
            options["data_parallel_size"] = data_parallel_size
            if data_parallel_rank is not None:
                if data_parallel_address is None:
                    raise ValueError(
                        f"data_parallel_rank={data_parallel_rank} needs data_parallel_address, where it meets"
                    )
                meet(data_parallel_address, data_parallel_rank, data_parallel_size, device, data_parallel_timeout_s)
        memory = CacheMemory(**_fields(CacheMemory, given))
        stages = options.get("pipeline_parallel_size", 1)
        processes = starts_ranks(
            distributed_executor_backend, stages if stages != 1 else options.get("tensor_parallel_size", 1)
        )  # fmt: skip
        if stages != 1 and not processes:
            raise ValueError(
                f"pipeline_parallel_size={stages}: stages are processes that this one starts; leave out"
                f" distributed_executor_backend={distributed_executor_backend!r}, and torchrun"
            )
        if options.get("tensor_parallel_size", 1) != 1 and not processes:
            for name in [name for name in ("enable_lora", "speculative_config") if given.get(name)]:
                raise ValueError(
                    f"{name}: processes that torchrun started decide each for itself, and this goes by how long things"
                    " take; use distributed_executor_backend='mp'"
                )
        if trust_remote_code:
            check_options(["trust_remote_code"])
        if sparse_kv is not None:
            _check_sparse(sparse_kv, given)
            if not options.get("enforce_eager"):
                options.setdefault("cudagraph_mode", "piecewise")
        if model_impl != "auto":
            options["entry"] = entry_of(model_impl, options.get("entry"))
        check_options(options, {*inspect.signature(LLM).parameters} - {"model", "options"})
        if type(seed) is not int:
            raise ValueError(f"seed={seed!r}: wanted a whole number; 0 is the default")
        limits = SchedulerConfig(**_fields(SchedulerConfig, given))
        self.data_parallel_rank = data_parallel_rank
        self.profiler_config = options_of(ProfilerConfig, profiler_config, "profiler_config")
        speculation = options_of(SpeculativeConfig, speculative_config, "speculative_config")
        if speculation is not None:
            speculation.check_ranks(2 if processes else 1)
            options["num_speculative_tokens"] = speculation.num_speculative_tokens
            if speculation.method == "mtp":
                options["return_hidden_states"] = True
        find_policy(scheduling_policy)
        check_mode(logprobs_mode)
        if cache_dir is not None:
            caches.set_cache_dir(cache_dir)
        directory = resolve_model(model)
        home = model_of(directory) if tokenizer is None else resolve_model(tokenizer, weights=False)
        self._default_params = default_params(read_generation_config(generation_config, model_of(directory)))
        if skip_tokenizer_init and tokenizer is not None:
            raise ValueError(f"skip_tokenizer_init and tokenizer={str(tokenizer)!r} contradict; leave one out")
        self.tokenizer = Tokenizer(home) if not skip_tokenizer_init and has_tokenizer(home) else None
        self._policy, self.enable_sleep_mode = scheduling_policy, enable_sleep_mode
        self._ids = itertools.count()
        if ranks == "start":
            changed = {n: v for n, v in given.items() if n not in _DEFAULTS or v != _DEFAULTS[n].default}
            self.engine = self.executor = _engines(model, changed, self.tokenizer is not None)
            return
        options |= {"dtype": dtype, "device": device, "seed": seed}
        options["max_model_len"] = None if max_model_len == "auto" else max_model_len
        runner: Any  # after the tokenizer: what reading that frees is used again
        if processes:
            from seamwise.runtime.engine.executor_processes import RankProcesses

            ranks = options.pop("pipeline_parallel_size" if stages != 1 else "tensor_parallel_size")
            runner = self.executor = RankProcesses(
                directory, ranks, options, extension=worker_extension_cls, stages=stages != 1
            )  # fmt: skip
        else:
            runner = ModelRunner.load(directory, **options)
            runner.set_sparse_kv(sparse_kv)
            self.executor = InProcess(runner, str(model), worker_extension_cls)
        check_batch_invariant(batch_invariant, runner.program, torch.device(runner.options.device))
        drafter = None
        if speculation is not None:
            drafter = find_drafter(speculation, runner, self.tokenizer, max_num_batched_tokens)
        self.drafter = drafter if isinstance(drafter, ModelDrafter) else None
        memory.allocate(
            runner, self.drafter, ranks_are_processes=processes, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, fit_model_len=max_model_len == "auto",
        )  # fmt: skip
        adapters, drafting = None, None
        if options.get("enable_lora"):
            adapters = Adapters(runner, runner.adapters.max_loras, max_cpu_loras)
        elif max_cpu_loras is not None:
            raise ValueError("max_cpu_loras needs enable_lora=True")
        if speculation is not None:
            drafting = Drafting(drafter=drafter, most=speculation.num_speculative_tokens)
        offload = make_offload(
            runner, ahead=2 * -(-max_num_batched_tokens // runner.block_size) * len(runner.kv_groups),
            num_ranks=runner.options.num_ranks, on_ranks=runner.open_stores if processes else None,
            enable_prefix_caching=enable_prefix_caching,
            **{name: value for name, value in given.items() if name.startswith("kv_offloading_")},
        )  # fmt: skip
        recorder = None if decisions_dir is None else record_in(decisions_dir, limits, data_parallel_rank)
        self.engine = Engine(
            runner, self.tokenizer, limits, enable_prefix_caching=enable_prefix_caching, seed=seed,
            logprobs_mode=logprobs_mode, drafting=drafting, adapters=adapters, pooler=runner.options.pooler,
            offload=offload, recorder=recorder,
        )  # fmt: skip
        self.engine.alike = runner.options.tensor_parallel_size > 1 and not processes
        if generation_config == "vllm":
            self.engine.ends_with(runner.config.raw.get("eos_token_id"))

    def scale_elastic_ep(self, new_data_parallel_size: int) -> None:
        """Serve with another number of engines. Raises ValueError where data_parallel_size was not given."""
        if not hasattr(self.engine, "scale"):
            raise ValueError("scale_elastic_ep: there is one engine, in this process; give LLM data_parallel_size")
        self.engine.scale(new_data_parallel_size)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the options of a request that brings none: the model's recommended ones, see generation_config."""
        return self._default_params

    def reset_prefix_cache(self) -> None:
        """Forget what the KV cache holds. Raises RuntimeError while requests run."""
        self.engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """End the threads and processes of this model, which answers nothing afterwards.

        What the KV cache holds is written to kv_offloading_folder, where there is one.
        """
        self.engine.close()
        self.executor.shutdown()

    def get_tokenizer(self) -> Any:
        """Return the transformers tokenizer of the model."""
        return self._tokenizer().full

    @named_arguments(**_INSTEAD)
    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True,
        priority: Sequence[int] | None = None, lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Continue each prompt: a string, {"prompt": str} or {"prompt_token_ids": [int]}. Outputs are in its order.

        priority  one for each prompt, lower ones first, with scheduling_policy="priority"
        lora_request  the adapter that prompts are computed with, or one (or None) for each; with enable_lora
        Raises ValueError for a prompt that cannot be served, naming its index, before anything is computed.
        """
        if priority is not None and self._policy != "priority":
            raise ValueError('priority is read by scheduling_policy="priority" only; give it to LLM(…)')
        batch = asked(
            self.engine, self._prompt, prompts, sampling_params or self._default_params, lora_request,
            priority=priority,
        )  # fmt: skip
        return run(self.engine, self._ids, batch, use_tqdm)

    @named_arguments(**_INSTEAD)
    def chat(
        self, messages: Sequence[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        use_tqdm: bool = True, chat_template: str | None = None, chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer a conversation (a list of {"role", "content"}) or a list of them, by the model's chat template.

        A content is a string or a list of {"type": "text", "text": str}. The options are those of render_chat in
        runtime/text/chat.py, which vLLM's `LLM.chat` names so.
        """
        if isinstance(messages, (str, Mapping)) or not messages:
            raise ValueError(f"chat: got {messages!r}, wanted a list of {{'role': …, 'content': …}}")
        conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
        tokenizer = self._tokenizer()
        options = {
            "chat_template": chat_template, "chat_template_content_format": chat_template_content_format,
            "add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message,
            "tools": tools, "chat_template_kwargs": chat_template_kwargs,
        }  # fmt: skip
        prompts: list[Prompt] = []
        for i, conversation in enumerate(conversations):
            try:
                ids = tokenizer.apply_chat_template(conversation, **options)
            except ValueError as error:
                raise ValueError(f"conversation {i}: {error}" if len(conversations) > 1 else str(error)) from error
            prompts.append({"prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError('this model directory has no tokenizer; pass tokenizer=, or {"prompt_token_ids": […]}')
        return self.tokenizer

    def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        return read_prompt(prompt, lambda text: self._tokenizer().encode(text))


_DEFAULTS = inspect.signature(LLM).parameters


def _fields(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of this record, which has their names."""
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}


def _engines(model: str | Path, options: dict[str, Any], has_tokenizer: bool) -> Any:
    try:
        from .data_parallel import DataParallel
    except ImportError as error:
        what = f"data_parallel_size={options['data_parallel_size']} needs pyzmq and msgspec"
        raise ValueError(f"{what}: {pip_install('serve')}") from error
    return DataParallel(model, options, has_tokenizer)


_NOT_SPARSE = {  # options that sparse_kv does not work with, and why
    **dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"), "a function is this process's"
    ),
    "speculative_config": "a step that verifies guesses has pages picked for all of its tokens at once",
    "batch_invariant": "pages are picked for what a step has of a prompt, so its chunks change rows",
    "kv_offloading_folder": "a later start, with other pages picked, would find these blocks",
}  # fmt: skip


def _check_sparse(sparse_kv: Any, given: Mapping[str, Any]) -> None:
    if not callable(sparse_kv):
        raise ValueError(f"sparse_kv={sparse_kv!r}: wanted a function of a KVView (runtime/runner/sparse_kv.py)")
    for name, why in _NOT_SPARSE.items():
        if (value := given.get(name)) not in (None, False, 1) or value is True:
            raise ValueError(f"sparse_kv with {name}={value!r}: {why}; leave one out")
