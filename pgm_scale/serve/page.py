"""The page at `/`: plain, self-contained, nothing from elsewhere."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pgm-scale</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
textarea { width: 100%; box-sizing: border-box; font: inherit; }
input { width: 5rem; font: inherit; } label { margin-right: 1rem; }
#out { white-space: pre-wrap; border-left: 3px solid #888; padding-left: 1rem; min-height: 3rem; }
#out i { color: #999; font-style: normal; } #out b { font-weight: normal; background: #ffef9f; color: #000; }
img { image-rendering: pixelated; min-width: 64px; margin: 2px; } #error { color: #b00020; }
</style></head><body>
<h1 id="name">pgm-scale</h1>
<p id="about"></p>
<form id="form">
<p><textarea id="prompt" rows="4" placeholder="Prompt; or text with holes, as: The {4} of a list."></textarea></p>
<p><label>tokens <input id="max_tokens" type="number" value="32" min="1"></label>
<label>steps <input id="steps" type="number" min="1"></label>
<label>temperature <input id="temperature" type="number" value="1" step="0.1" min="0"></label>
<label>seed <input id="seed" type="number"></label></p>
<p><button>Generate</button> <button type="button" id="stop">Stop</button></p>
</form>
<p id="error"></p><div id="out"></div>
<p><small>Holes, {N}, go to /v1/infill; other text goes to /v1/completions; classes, between commas, to /v1/images.
GET <a href="/v1/models">/v1/models</a>, <a href="/health">/health</a>, <a href="/ready">/ready</a>,
<a href="/metrics">/metrics</a>.</small></p>
<script>
"use strict";
const el = id => document.getElementById(id);
let running = null, isImages = false;
fetch("/v1/models").then(r => r.json()).then(list => {
  const model = list.data[0];
  el("name").textContent = model.id;
  isImages = model.samplers.some(kind => kind === "halton");
  el("about").textContent = (isImages ? "Images of classes" : "At most " + model.length_tokens + " tokens")
    + "; samplers: " + model.samplers.join(", ") + "; steps: " + model.steps;
  if (isImages) el("prompt").placeholder = "Classes, by name or number, between commas";
});
const number = id => el(id).value === "" ? undefined : Number(el(id).value);
function request(text) {
  const common = { steps: number("steps"), temperature: number("temperature"), seed: number("seed") };
  if (isImages) {
    const classes = text.split(",").map(item => item.trim()).filter(item => item)
      .map(item => /^[0-9]+$/.test(item) ? Number(item) : item);
    return ["/v1/images", { ...common, classes: classes.length ? classes : undefined }];
  }
  if (/\\{[0-9]+\\}/.test(text)) return ["/v1/infill", { ...common, template: text, stream: true }];
  return ["/v1/completions", { ...common, prompt: text, max_tokens: number("max_tokens"), stream: true }];
}
function show(pieces, latest, prefix) {
  el("out").textContent = prefix;
  const last = Math.max(-1, ...pieces.keys());
  for (let at = 0; at <= last; at++) {
    const part = document.createElement(latest.has(at) ? "b" : pieces.has(at) ? "span" : "i");
    part.textContent = pieces.has(at) ? pieces.get(at) : "\\u00b7";
    el("out").append(part);
  }
}
async function stream(response, prefix) {
  const pieces = new Map(), reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", whole = prefix;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\\n\\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice(6);
      if (data === "[DONE]") { el("out").textContent = whole; continue; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        whole += choice.text;
        for (const token of choice.tokens || []) pieces.set(token.position, token.text);
        show(pieces, new Set((choice.tokens || []).map(token => token.position)), prefix);
      }
    }
  }
}
el("form").addEventListener("submit", async event => {
  event.preventDefault();
  if (running) running.abort();
  running = new AbortController();
  el("error").textContent = ""; el("out").textContent = "";
  const text = el("prompt").value, [path, body] = request(text);
  try {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(body), signal: running.signal };
    const response = await fetch(path, options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    if (path === "/v1/images") {
      for (const item of (await response.json()).data) {
        const image = new Image();
        image.src = "data:image/png;base64," + item.b64_json;
        image.title = item.class;
        el("out").append(image);
      }
    } else await stream(response, path === "/v1/infill" ? "" : text);
  } catch (error) {
    if (error.name !== "AbortError") el("error").textContent = error.message;
  }
});
el("stop").addEventListener("click", () => running && running.abort());
</script></body></html>
"""
