"use strict";
const at = (id) => document.getElementById(id);
const key = at("key");
key.value = sessionStorage.getItem("key") || "";
key.addEventListener("change", () => sessionStorage.setItem("key", key.value));
const headers = () => (key.value ? { Authorization: `Bearer ${key.value}` } : {});

function element(name, text, classes) {
  const made = document.createElement(name);
  made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

function fill(table, head, rows) {
  const line = (cells, kind) => {
    const row = document.createElement("tr");
    cells.forEach((cell, i) => row.append(element(kind, typeof cell === "number" ? cell.toLocaleString() : cell,
      i ? "number" : "")));
    return row;
  };
  table.replaceChildren(line(head, "th"), ...rows.map((row) => line(row, "td")));
}

function statusPage() {
  const seen = [];
  async function look() {
    let told;
    try {
      const answer = await fetch("status", { headers: headers() });
      told = await answer.json();
      if (!answer.ok) throw new Error(told.error.message);
    } catch (error) {
      at("state").textContent = error.message;
      at("state").className = "state bad";
      if (/key/.test(error.message)) at("access").open = true;
      return;
    }
    at("model").textContent = told.models.join(", ");
    at("state").textContent = told.state === "ready" ? "ready" : `${told.state}: ${told.reason || told.stage}`;
    at("state").className = told.state === "ready" ? "state" : "state bad";
    seen.push([told.now_s, told.generation_tokens]);
    while (seen.length > 61) seen.shift();
    const rates = seen.slice(1).map(([now, tokens], i) => Math.max(0, (tokens - seen[i][1]) / (now - seen[i][0])));
    const cards = {
      running: told.running, waiting: told.waiting,
      "tokens/s": (rates.at(-1) || 0).toFixed(1), "cache in use": `${(100 * told.kv_cache_usage).toFixed(1)} %`,
      "prefix hits": `${(100 * told.prefix_hit_rate).toFixed(0)} %`, restarts: told.restarts,
      "tokens produced": told.generation_tokens.toLocaleString(),
    };
    at("cards").replaceChildren(...Object.entries(cards).map(([name, value]) => {
      const card = element("div", "", "card");
      card.append(element("b", value), element("span", name, "soft"));
      return card;
    }));
    const top = Math.max(1, ...rates);
    document.querySelector("#rate polyline").setAttribute("points",
      rates.map((rate, i) => `${120 - 2 * (rates.length - 1 - i)},${97 - 94 * rate / top}`).join(" "));
    fill(at("latencies"), ["", "requests", "mean ms"], told.latencies.map((l) => [l.name, l.count, Math.round(10 * l.mean_ms) / 10]));
    fill(at("startup"), ["stage", "seconds"], Object.entries(told.startup_s).map(([name, s]) => [name, Math.round(1000 * s) / 1000]));
    const passes = told.explain.passes || [];
    fill(at("passes"), ["pass", "matched", "promised", "misses"],
      passes.map((p) => [p.name, p.matched, p.expected ?? "–", p.misses.length]));
    at("pieces").textContent = told.explain.pieces
      ? `${told.explain.pieces.total} pieces, ${told.explain.pieces.distinct} distinct; ${told.explain.seams} seams` : "";
  }
  key.addEventListener("change", look);
  look();
  setInterval(look, 2000);
}

function playground() {
  const messages = [];
  let running = null;
  fetch("v1/models", { headers: headers() }).then((answer) => answer.json())
    .then((told) => { at("model").textContent = told.data[0].id; }).catch(() => {});
  const show = (text, who) => at("said").appendChild(element("div", text, `message ${who}`));

  async function ask(question) {
    messages.push({ role: "user", content: question });
    show(question, "user");
    const system = at("system").value ? [{ role: "system", content: at("system").value }] : [];
    const body = { messages: [...system, ...messages], stream: true, max_tokens: Number(at("max_tokens").value),
      temperature: Number(at("temperature").value), stream_options: { include_usage: true } };
    let said = null, thought = null, text = "", held = "", usage = null;
    running = new AbortController();
    const started = performance.now();
    try {
      const answer = await fetch("v1/chat/completions", { method: "POST", signal: running.signal,
        headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body) });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        held += part.value;
        const events = held.split("\n\n");
        held = events.pop();
        for (const event of events.filter((e) => e.startsWith("data: {"))) {
          const told = JSON.parse(event.slice(6));
          if (told.error) throw new Error(told.error.message);
          usage = told.usage || usage;
          const delta = told.choices[0]?.delta || {};
          if (delta.reasoning) (thought ||= show("", "thought")).textContent += delta.reasoning;
          if (delta.content) { text += delta.content; (said ||= show("", "assistant")).textContent = text; }
          scrollTo(0, document.body.scrollHeight);
        }
      }
      if (usage) at("state").textContent =
        `${usage.completion_tokens} tokens, ${(1000 * usage.completion_tokens / (performance.now() - started)).toFixed(1)} tokens/s`;
    } catch (error) {
      if (error.name !== "AbortError") show(error.message, "bad");
      if (!text) { messages.pop(); return; }
    } finally {
      running = null;
    }
    messages.push({ role: "assistant", content: text });
  }

  at("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    const question = at("question").value.trim();
    if (!question || running) return;
    at("question").value = "";
    at("send").hidden = true; at("stop").hidden = false;
    await ask(question);
    at("send").hidden = false; at("stop").hidden = true;
    at("question").focus();
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("ask").requestSubmit(); }
  });
}

({ statusPage, playground })[document.body.dataset.page]();
