"""Routes that change the engine, over the fake one."""

from __future__ import annotations

import concurrent.futures
import json
import time

from servers import Running, get, post, until

TEXT = "/v1/completions"


def in_work(fake: Running, count: int) -> None:
    """Wait until the engine has so many requests, and computes."""
    engine = fake.state.llm.engine
    until(lambda: engine.num_requests == count and engine.stats.num_running > 0, lambda: engine.stats)


def test_pause_keeps_waits_or_aborts_and_arrivals_wait(fake: Running) -> None:
    fake.wait_ready()
    body = {"prompt": "Z", "max_tokens": 6}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = pool.submit(post, fake.url + TEXT, body)
        in_work(fake, 1)
        assert post(f"{fake.url}/pause?mode=keep", {})[0] == 200
        assert get(f"{fake.url}/is_paused") == (200, {"is_paused": True})
        late = pool.submit(post, fake.url + TEXT, {"prompt": "ab", "max_tokens": 3})
        in_work(fake, 2)
        time.sleep(0.5)
        steps = fake.state.llm.engine.stats.num_steps
        time.sleep(0.3)
        assert not running.done() and not late.done() and fake.state.llm.engine.stats.num_steps == steps
        assert post(f"{fake.url}/resume", {})[0] == 200
        assert running.result(60)[1]["choices"][0]["text"] == "ZZZZZZ"
        assert late.result(60)[1]["choices"][0]["text"] == "aba"

        running = pool.submit(post, fake.url + TEXT, body)
        in_work(fake, 1)
        assert post(f"{fake.url}/pause?mode=wait", {})[0] == 200
        assert running.result(60)[0] == 200  # it was waited for
        assert post(f"{fake.url}/resume", {})[0] == 200

        running = pool.submit(post, fake.url + TEXT, body)
        in_work(fake, 1)
        assert post(f"{fake.url}/pause", {})[0] == 200
        status, answer = running.result(60)
        assert status == 503 and "was aborted" in answer["error"]["message"]
        assert post(f"{fake.url}/resume", {})[0] == 200
    assert post(f"{fake.url}/pause?mode=sideways", {})[0] == 400
    assert get(f"{fake.url}/is_paused") == (200, {"is_paused": False})


def test_aborting_by_id_and_all(fake: Running) -> None:
    fake.wait_ready()
    body = {"prompt": "Z", "max_tokens": 50}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        named = pool.submit(post, fake.url + TEXT, {**body, "request_id": "mine"})
        other = pool.submit(post, fake.url + TEXT, {**body, "max_tokens": 8})
        in_work(fake, 2)
        assert post(f"{fake.url}/abort_requests", {"request_ids": ["cmpl-mine", "cmpl-nobody"]})[0] == 200
        assert named.result(60)[0] == 503 and other.result(60)[0] == 200
        everything = [pool.submit(post, fake.url + TEXT, body) for _ in range(2)]
        in_work(fake, 2)
        assert post(f"{fake.url}/abort_requests", {})[0] == 200
        assert [f.result(60)[0] for f in everything] == [503, 503]


def test_what_the_engine_lacks_is_501_and_what_is_switched_off_404(fake: Running) -> None:
    fake.wait_ready()
    assert post(f"{fake.url}/start_weight_update", {})[0] == 501
    assert post(f"{fake.url}/sleep?level=3", {})[0] == 400
    status, answer = post(f"{fake.url}/collective_rpc", {"method": "x"})
    assert status == 404 and "enable_collective_rpc" in answer["error"]["message"]
    assert post(f"{fake.url}/reset_prefix_cache", {}) == (200, {"status": "reset"})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, fake.url + TEXT, {"prompt": "Z", "max_tokens": 20})
        in_work(fake, 1)
        status, answer = post(f"{fake.url}/reset_prefix_cache", {})
        assert status == 409 and "1 requests are running" in answer["error"]["message"]
        assert post(f"{fake.url}/reset_prefix_cache?reset_running_requests=true", {})[0] == 200
        assert running.result(60)[0] == 503
    assert get(f"{fake.url}/get_world_size") == (200, {"world_size": 1})


def test_token_in_token_out_and_responses(fake: Running) -> None:
    fake.wait_ready()
    status, answer = post(
        f"{fake.url}/inference/v1/generate",
        {"token_ids": [0, 1, 2], "sampling_params": {"max_tokens": 4, "logprobs": 0}, "request_id": "me"},
    )
    assert status == 200 and answer["request_id"] == "generate-tokens-me"
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [0, 1, 2, 0] and len(choice["logprobs"]["content"]) == 4
    status, answer = post(f"{fake.url}/v1/responses", {"input": "hi", "max_output_tokens": 3, "instructions": "be"})
    assert status == 200 and answer["output"][0]["content"][0]["text"] == "<sy" and answer["status"] == "incomplete"


def test_a_model_that_sleeps_says_so(fake: Running) -> None:
    fake.wait_ready()
    restarts = fake.state.llm.engine.num_restarts
    assert get(f"{fake.url}/is_sleeping") == (200, {"is_sleeping": False})
    assert post(f"{fake.url}/sleep?level=2", {})[0] == 200
    assert get(f"{fake.url}/is_sleeping") == (200, {"is_sleeping": True})
    status, answer = post(fake.url + TEXT, {"prompt": "a"})
    assert status == 503 and "the model sleeps; POST /wake_up first" in answer["error"]["message"]
    until(lambda: 'sleep_state="discard_all"} 1.0' in get(f"{fake.url}/metrics")[1])
    assert post(f"{fake.url}/wake_up?tags=weights&tags=kv_cache", {})[0] == 200
    assert post(fake.url + TEXT, {"prompt": "a", "max_tokens": 2})[0] == 200
    assert fake.state.llm.engine.num_restarts == restarts


def test_several_prompts_of_one_request_come_side_by_side(fake: Running) -> None:
    fake.wait_ready()
    prompts, wanted = ["abc", "Zd", "ab"], ["abca", "ZdZd", "abab"]
    body = {"prompt": prompts, "max_tokens": 4, "n": 2}
    status, whole = post(fake.url + TEXT, body)
    assert status == 200 and [choice["text"] for choice in whole["choices"]] == [text for text in wanted for _ in "ab"]
    status, streamed = post(fake.url + TEXT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    lines = streamed.splitlines()[::2]
    assert status == 200 and lines.pop() == "data: [DONE]"
    *events, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [choice for event in events for choice in event["choices"]]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == i) for i in range(6)]
    assert texts == [text for text in wanted for _ in "ab"] and last["usage"] == whole["usage"]
    assert [choice["index"] for choice in choices] != sorted(choice["index"] for choice in choices)
    until(lambda: not fake.state.works)
