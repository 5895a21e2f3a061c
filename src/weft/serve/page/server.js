// Requests to the server and its answers: the key, streamed events, and error messages.

const GONE = "The server does not answer. It has stopped, or the way to it is broken. Start it again (weft serve), then try once more.";
const KEY = "weft-key";
const LONGEST = 600; // maximum number of characters of a server's message

// An error with a message for the user.
class Problem extends Error {}

// The key is kept in this tab only. Without session storage, the page asks for it after each reload.
let keyHere = null;

function savedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? keyHere;
  } catch {
    return keyHere;
  }
}

function saveKey(key) {
  keyHere = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Storage is switched off: the key is in keyHere only.
  }
}

function askForKey(why) {
  const dialog = $("ask"), input = $("key");
  $("ask-why").textContent = why;
  input.value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((answered) =>
    dialog.addEventListener("close", () => answered(dialog.returnValue === "use" ? input.value : null), { once: true }));
}

// A successful response; asks for the key until the server accepts it.
async function ask(path, options = {}) {
  for (;;) {
    const key = savedKey();
    const headers = { "Content-Type": "application/json", ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new Problem(GONE);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    const given = await askForKey(key === null ? "It was started with --api-key." : "It does not take the key that it was given.");
    if (given === null) throw new Problem("The server answers nobody without its key (401). Try again to give it.");
    saveKey(given);
  }
}

async function refusal(response) {
  const said = await messageOf(response);
  const { status } = response;
  if (status >= 500) return new Problem(`The server failed (${status}): ${said}. Its log says more.`);
  return new Problem(`The server refuses this (${status}): ${said}`);
}

// The message in the body of an error: in OpenAI's format, in another format, or the whole text.
async function messageOf(response) {
  const text = await response.text().catch(() => "");
  let said = text;
  try {
    const body = JSON.parse(text);
    said = [body.error?.message, body.error, body.message, body.detail].find((value) => typeof value === "string") ?? text;
  } catch {
    // Not JSON: the text itself.
  }
  return visible(said.trim().slice(0, LONGEST).replace(/\.$/, "") || response.statusText || "no reason given");
}

// Decodes bytes, in chunks of any size, to the data of server-sent events.
class Events {
  constructor() {
    this.decoder = new TextDecoder();
    this.rest = "";
    this.data = [];
  }

  // The data of all events that are complete with these bytes.
  read(bytes) {
    const whole = [];
    // A carriage return at the end may be the first half of a line break.
    const lines = (this.rest + this.decoder.decode(bytes, { stream: true })).split(/\r\n|\n|\r(?!$)/);
    this.rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) this.data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && this.data.length) {
        whole.push(this.data.join("\n"));
        this.data = [];
      }
    }
    return whole;
  }
}

// The chunks of an answer, as they arrive.
async function* streamed(path, body, signal) {
  const response = await ask(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = response.body.getReader(), events = new Events();
  let finished = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      for (const data of events.read(value)) {
        if (data === "[DONE]") return;
        const choice = choiceIn(data);
        if (choice?.finish_reason) finished = true;
        if (choice) yield choice;
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof Problem) throw error;
    throw new Problem("The connection broke while the server answered. What came is kept. If the server has stopped, start it again (weft serve).");
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!finished) throw new Problem("The server ended the answer before it was complete. Its log may say why.");
}

function choiceIn(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Problem(`The server sent what is no part of an answer: ${visible(data.slice(0, 80))}`);
  }
  if (chunk?.error) throw new Problem(`The server broke off: ${visible(String(chunk.error.message ?? chunk.error).slice(0, LONGEST))}`);
  return chunk?.choices?.[0];
}
