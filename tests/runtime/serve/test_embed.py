"""`LLM.embed` on tiny models: transformers' hidden states with sentence-transformers' arithmetic, beside others, cut
into chunks, and from the prefix cache as far as it may."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file
from servers import get, run_app
from test_pooler import older, save_modules
from tiny_models import save_tiny
from tiny_tokenizers import bpe
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast

from seamwise import LLM, SamplingParams
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.sampling.pooling_params import PoolingParams
from seamwise.runtime.serve.async_llm import AsyncLLM

Make = Callable[..., LLM]
TEXTS = [[5, 6, 7], [40] * 21, list(range(30, 63)), [9], list(range(2, 90))]


def ids(*texts: list[int]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": text} for text in texts]


@pytest.fixture(scope="module")
def qwen3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-Embedding: no head, names without "model.", sentence-transformers' files; cut to 16 or 32."""
    directory = tmp_path_factory.mktemp("tiny_qwen3_embedding")
    save_tiny(directory, "Qwen3Model", head_dim=16, vocab_size=300, matryoshka_dimensions=[16, 32])
    save_modules(directory, older("lasttoken"), "Normalize", max_seq_length=200)
    PreTrainedTokenizerFast(tokenizer_object=bpe(), eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def make(qwen3_dir: Path, pack_dir: Path) -> Make:
    def llm(directory: Path = qwen3_dir, **options: Any) -> LLM:
        defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "block_size": 4, "pack_dir": pack_dir}
        return LLM(directory, **(defaults | options))

    return llm


@pytest.fixture(scope="module")
def llm(make: Make) -> LLM:
    return make()


def vectors(llm: LLM, *texts: list[int], **params: Any) -> list[np.ndarray]:
    return [o.outputs.data for o in llm.encode(ids(*texts), PoolingParams(**params))]


def reference(model: Any, text: list[int], kind: str, normalize: bool, dimensions: int | None = None) -> torch.Tensor:
    """Return what sentence-transformers' Pooling and Normalize make of transformers' hidden states."""
    with torch.no_grad():
        hidden_PD = model(torch.tensor([text]), use_cache=False).last_hidden_state[0]
    pooled = {"LAST": hidden_PD[-1], "CLS": hidden_PD[0], "MEAN": hidden_PD.sum(0) / len(hidden_PD)}[kind][:dimensions]
    return nn.functional.normalize(pooled, dim=0) if normalize else pooled


@pytest.mark.parametrize("kind", ["LAST", "MEAN", "CLS"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_sentence_transformers(make: Make, qwen3_dir: Path, kind: str, normalize: bool) -> None:
    theirs = AutoModel.from_pretrained(qwen3_dir, dtype=torch.float32, attn_implementation="eager").eval()
    same = [reference(theirs, text, kind, normalize) for text in TEXTS]
    exact = [reference(theirs.double(), text, kind, normalize) for text in TEXTS]
    config = {"seq_pooling_type": kind, "use_activation": normalize}
    for got, near, right in zip(vectors(make(pooler_config=config), *TEXTS), same, exact, strict=True):
        assert got.dtype == np.float32 and got.shape == (64,)
        budget = 2 * ((near - right).abs().max() + torch.finfo(torch.float32).eps * right.abs().max())
        assert float((torch.from_numpy(got.copy()).double() - right).abs().max()) <= float(budget)


@pytest.mark.parametrize("kind", ["LAST", "MEAN", "CLS"])
def test_a_text_beside_others_and_in_chunks_is_the_one_alone_in_bits(make: Make, kind: str) -> None:
    options: dict[str, Any] = {"pooler_config": {"seq_pooling_type": kind}}
    one_by_one = make(**options)
    alone = [vectors(one_by_one, text)[0] for text in TEXTS]
    for more in ({"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 13, "async_scheduling": False}):
        crowded = make(**options, **more)
        for got, want in zip(vectors(crowded, *TEXTS, *TEXTS), alone * 2, strict=True):
            assert got.tobytes() == want.tobytes()
        crowded.engine.scheduler.check()
        assert not crowded.engine.has_unfinished_requests()


@pytest.mark.parametrize(("kind", "cached"), [("LAST", 20), ("MEAN", 0), ("CLS", 0)])
def test_the_prefix_cache_skips_no_token_that_is_pooled(make: Make, kind: str, cached: int) -> None:
    llm = make(pooler_config={"seq_pooling_type": kind})
    text = list(range(3, 24))  # 21 tokens: five blocks of 4 before the last
    first, again = (llm.encode(ids(text))[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, cached)
    assert first.outputs.data.tobytes() == again.outputs.data.tobytes()
    longer = llm.encode(ids([*text, 50, 51]))[0]
    fresh = make(pooler_config={"seq_pooling_type": kind}, enable_prefix_caching=False).encode(ids([*text, 50, 51]))
    assert longer.outputs.data.tobytes() == fresh[0].outputs.data.tobytes()


def test_preempted_texts_start_over(make: Make) -> None:
    """Of 24 blocks two long texts need 44: one waits for the other, or gives its blocks back."""
    options: dict[str, Any] = {"pooler_config": {"seq_pooling_type": "MEAN"}, "max_model_len": 88}
    small = make(**options, num_gpu_blocks_override=25, max_num_batched_tokens=11, scheduler_reserve_full_isl=False)
    texts = [list(range(2, 90)), list(range(89, 1, -1))]
    found = small.encode(ids(*texts))
    for got, want in zip(found, vectors(make(**options), *texts), strict=True):
        assert got.outputs.data.tobytes() == want.tobytes()


def test_dimensions_are_cut_before_the_length_is_made_one(make: Make, qwen3_dir: Path, llm: LLM) -> None:
    theirs = AutoModel.from_pretrained(qwen3_dir, dtype=torch.float32).eval().double()
    for wanted in (16, 32, 64):
        (got,) = vectors(llm, TEXTS[2], dimensions=wanted)
        want = reference(theirs, TEXTS[2], "LAST", True, wanted)
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
        assert abs(float(np.linalg.norm(got)) - 1) < 1e-6
    (plain,) = vectors(llm, TEXTS[2], use_activation=False)
    (short,) = vectors(make(pooler_config={"dimensions": 16, "use_activation": False}), TEXTS[2])
    assert plain[:16].tobytes() == short.tobytes()
    with pytest.raises(ValueError, match=r"prompt 1: dimensions=20: wanted one of 16, 32"):
        llm.embed(ids(*TEXTS[:2]), pooling_params=[PoolingParams(), PoolingParams(dimensions=20)])


def test_embed_encode_and_score_agree(llm: LLM) -> None:
    embedded = llm.embed(ids(*TEXTS))
    assert [o.outputs.embedding for o in embedded] == [v.tolist() for v in vectors(llm, *TEXTS)]
    assert [o.prompt_token_ids for o in embedded] == TEXTS and embedded[0].outputs.hidden_size == 64
    rows = np.array([o.outputs.embedding for o in embedded])
    scores = llm.score(ids(TEXTS[0])[0], ids(*TEXTS))
    np.testing.assert_allclose([o.outputs.score for o in scores], rows @ rows[0], atol=1e-6)
    pairs = llm.score(ids(*TEXTS[:2]), ids(*TEXTS[2:4]))
    np.testing.assert_allclose([o.outputs.score for o in pairs], (rows[:2] * rows[2:4]).sum(1), atol=1e-6)
    with pytest.raises(ValueError, match="score: got 2 and 3 texts"):
        llm.score(ids(*TEXTS[:2]), ids(*TEXTS[:3]))


def test_who_generates_does_not_pool_nor_the_other_way(llm: LLM, tiny_llama_dir: Path, make: Make) -> None:
    with pytest.raises(ValueError, match=r"prompt 0: this model pools \(runner='pooling'\) and generates nothing"):
        llm.generate(ids(*TEXTS[:2]), SamplingParams(detokenize=False))
    generating = make(tiny_llama_dir, max_model_len=64)
    with pytest.raises(ValueError, match="generates text and has no embeddings; load it with runner='pooling'"):
        generating.embed(ids(TEXTS[0]))
    with pytest.raises(ValueError, match="the text has 201 tokens, max_model_len is 200"):
        llm.embed(ids([5] * 201))  # sentence-transformers' max_seq_length
    assert len(vectors(llm, [5] * 200)) == 1  # nothing is generated: the text may be as long
    assert len(vectors(llm, TEXTS[0])) == 1
    for name, value in (("speculative_config", {"method": "ngram", "num_speculative_tokens": 2}),
                        ("return_hidden_states", True)):  # fmt: skip
        with pytest.raises(ValueError, match="runner='pooling' with"):
            make(**{name: value})


def test_a_generating_model_pools_what_its_head_would_read(tiny_llama_dir: Path, make: Make) -> None:
    """By either entry; the head is neither loaded nor computed, nor missed where a trainer sends it."""
    theirs = AutoModel.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval().double()
    for entry in ("own", "transformers"):
        pooling = make(tiny_llama_dir, runner="pooling", entry=entry, max_model_len=100)
        (got,) = vectors(pooling, TEXTS[4])
        np.testing.assert_allclose(got, reference(theirs, TEXTS[4], "LAST", True).numpy(), atol=2e-5)
        assert not [n for n in pooling.engine.runner.program.parameters if n.startswith("lm_head.")]
        pooling.update_weights(load_file(tiny_llama_dir / "model.safetensors"))
        assert vectors(pooling, TEXTS[4])[0].tobytes() == got.tobytes()


def test_a_class_that_computes_every_tokens_logits(tmp_path: Path, make: Make) -> None:
    """XGLM's forward has no logits_to_keep: its head reads all rows, of which the wanted ones are taken."""
    model = save_tiny(tmp_path, "XGLMForCausalLM", d_model=64, ffn_dim=48, num_layers=2, attention_heads=4)
    theirs = model.model  # its own mask does not fit float64
    (got, other) = vectors(make(tmp_path, runner="pooling", max_model_len=64), TEXTS[2], TEXTS[0])
    np.testing.assert_allclose(got, reference(theirs, TEXTS[2], "LAST", True).numpy(), atol=2e-5)
    np.testing.assert_allclose(other, reference(theirs, TEXTS[0], "LAST", True).numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Qwen2ForCausalLM", {"is_causal": False}, "is_causal is False: attention to later tokens is not served"),
        ("Gemma3TextModel", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True: attention to"),
        ("RobertaModel", {}, "is_causal=False is not served; wanted plain causal attention"),
        ("BertModel", {}, "has no such causal language model"),
    ],
)
def test_encoders_are_refused(architecture: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, architecture, **({"head_dim": 16} if "Gemma" in architecture else {}))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        ModelRunner.load(tmp_path, device="cpu", runner="pooling", pack_dir=None)


def test_the_openai_client_gets_the_vectors_of_offline(qwen3_dir: Path, pack_dir: Path, make: Make) -> None:
    """Floats and base64, texts and ids, cut, all at once beside each other; and what is refused, by name."""
    texts = ["Hello there", "don't worry. " * 12, "naïve café 数字"]
    offline = make(pooler_config={"seq_pooling_type": "MEAN"})
    prompts = [o.prompt_token_ids for o in offline.embed(texts)]
    want = np.array([o.outputs.embedding for o in offline.embed(texts)], dtype=np.float32)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "block_size": 4}
    llm = AsyncLLM(
        qwen3_dir, pack_dir=pack_dir, pooler_config={"seq_pooling_type": "MEAN"}, max_num_batched_tokens=16, **options
    )
    with run_app({"tiny": llm}, trust_request_chat_template=True) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

        def asked(given: Any, **more: Any) -> Any:
            return client.embeddings.create(model="tiny", input=given, **more)

        with ThreadPoolExecutor(8) as pool:
            each = [(texts, {}), (texts, {"encoding_format": "float"}), (prompts, {}), (texts[1], {}), (prompts[2], {})]
            answers = list(pool.map(lambda one: asked(one[0], **one[1]), each * 2))
        for (given, _), answer in zip(each * 2, answers, strict=True):
            rows = {str(texts[1]): want[1:2], str(prompts[2]): want[2:]}.get(str(given), want)
            got = np.array([d.embedding for d in answer.data], dtype=np.float32)  # the client decodes base64
            assert got.tobytes() == rows.tobytes() and [d.index for d in answer.data] == list(range(len(rows)))
            count = sum(map(len, prompts)) if len(rows) == 3 else len(prompts[1 if given == texts[1] else 2])
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)
        short = asked(texts[0], dimensions=16).data[0].embedding
        np.testing.assert_allclose(short, want[0, :16] / np.linalg.norm(want[0, :16]), atol=1e-6)
        text = asked(texts[0], encoding_format="base64").data[0].embedding
        assert base64.b64decode(text) == want[0].astype("<f4").tobytes()
        for given, more, message in (
            (texts[0], {"dimensions": 17}, "dimensions=17: wanted one of 16, 32"), ([5] * 201, {}, "has 201 tokens"),
            ("", {}, "has no tokens"), ([[5], [300]], {}, "token id 300: wanted 0 to 299"), ([], {}, "wanted 1 to"),
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match=message):
                asked(given, **more)
        with pytest.raises(openai.BadRequestError, match=r"pools .* and generates nothing"):
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.BadRequestError, match=r"pools .* and generates nothing"):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "a"}],
                extra_body={"chat_template": "{{ messages[0]['content'] }}"},
            )  # fmt: skip
        assert 'vllm:request_success_total{engine="0",finished_reason="stop"' in get(f"{running.url}/metrics")[1]
        assert running.state.num_in_work == 0


def test_what_is_pooled_is_counted(make: Make) -> None:
    kinds = {}
    for kind in ("LAST", "MEAN", "CLS"):
        runner = make(pooler_config={"seq_pooling_type": kind}).engine.runner
        kinds[kind] = runner.plan(max_num_seqs=4, max_num_batched_tokens=100)
    assert kinds["LAST"].pooling_bytes == 0
    assert kinds["MEAN"].pooling_bytes == kinds["CLS"].pooling_bytes == 8 * 64 * 8  # float64 of twice 4 texts
    each = runner.program.logit_bytes
    assert each >= 64 * 4  # a hidden state in float32
    assert kinds["MEAN"].activation_bytes - kinds["CLS"].activation_bytes == 96 * each
    assert "pooled states" in str(kinds["MEAN"])
