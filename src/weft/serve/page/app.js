// Buttons and keys: modes, sending and stopping, the theme.

const palette = new Palette(JSON.parse($("data").textContent).palette);
const tip = new Tip($("tip"));
// mode: write or chat; running: the AbortController of the present answer; turns: the messages of the chat.
const state = { mode: "write", running: null, turns: [] };
let info, group, settings, views;

const view = () => views[state.mode];

// ------------------------------------------------------------------ drawing

// Draw the numbers of the answer or of the selected token, once per frame.
let asked = false;
function drawSoon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw();
  });
}

function draw() {
  const { answer, chosen, pieces } = view();
  const piece = chosen === null ? null : pieces[chosen];
  $("of").textContent = piece ? `Token ${quoted(piece.text)}` : answer ? "This answer" : "Experts";
  setBars(settings.rows, piece?.shares ?? answer?.means() ?? new Float64Array(group.experts.length));
  $("bars").classList.toggle("idle", !piece && !answer?.tokens);
  for (const meter of document.querySelectorAll(".meter")) meter.textContent = answer?.pace() ?? "";
  enable($("add"), !state.running && Boolean(views.write.answer?.text));
  enable($("new"), state.turns.length > 0 && !state.running);
  for (const button of document.querySelectorAll("main .go")) enable(button, !state.running);
  for (const button of document.querySelectorAll("main .stop")) enable(button, Boolean(state.running));
  view().follow();
}

// aria-disabled and not `disabled`, so that an inactive button keeps the focus.
const enable = (button, able) => button.setAttribute("aria-disabled", String(!able));
const able = (button) => button.getAttribute("aria-disabled") !== "true";

const say = (text) => ($("say").textContent = text);

function tellChosen() {
  draw();
  const { chosen, pieces } = view();
  if (chosen === null) return say("");
  const { text, shares } = pieces[chosen];
  const ranked = shares ? Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, 3) : [];
  say([quoted(text), ...ranked.map((expert) => `${visible(group.experts[expert])} ${percent(shares[expert])}`)].join(", "));
}

// ------------------------------------------------------------------ sending

function send() {
  const { mode } = state;
  if (state.running || !settings.check() || !$(mode).querySelector("form").reportValidity()) return;
  if (mode === "write") {
    views.write.clear();
    answer(views.write, "v1/completions", { prompt: $("prompt").value });
    return;
  }
  const message = $("message").value;
  $("message").value = "";
  state.turns.push({ role: "user", content: message });
  const said = views.chat.say(message);
  answer(views.chat, "v1/chat/completions", { messages: [...state.turns] }).then((came) => {
    if (came.text) state.turns.push({ role: "assistant", content: came.text });
    else {
      // There was no answer: put the message back for another try, before text that was typed since.
      state.turns.pop();
      views.chat.withdraw(said);
      $("message").value = [message, $("message").value].filter(Boolean).join("\n");
    }
    draw();
  });
}

async function answer(to, path, body) {
  const { signal } = (state.running = new AbortController());
  const came = to.begin();
  let reason = null;
  say("The answer is coming.");
  drawSoon();
  try {
    for await (const choice of streamed(path, { ...settings.body(), ...body }, signal)) {
      to.add(choice.text ?? choice.delta?.content ?? "", rowsOf(choice, info.experts));
      reason = choice.finish_reason ?? reason;
      drawSoon();
    }
    if (reason === "length") to.note("Cut here: it has as many tokens as the settings allow.", "stopped");
    else if (!came.text) to.note("The answer is empty: the model ended it at once.", "stopped");
    say(`Done. ${came.pace()}`);
  } catch (error) {
    if (signal.aborted) {
      to.note("Stopped.", "stopped");
      say(`Stopped. ${came.pace()}`);
    } else {
      if (!(error instanceof Problem)) console.error(error);
      to.note(error.message, "problem", "alert");
      say("");
    }
  }
  state.running = null;
  draw();
  return came;
}

function stop() {
  state.running?.abort();
}

// ------------------------------------------------------------------ modes and keys

function show(mode) {
  state.mode = mode;
  for (const name of ["write", "chat"]) $(name).hidden = name !== mode;
  for (const button of $("switch").children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  tip.hide();
  draw();
}

function addToPrompt() {
  const written = views.write.answer.text;
  $("prompt").value += written;
  views.write.clear();
  $("prompt").focus();
  $("prompt").scrollTop = $("prompt").scrollHeight;
  draw();
}

function newChat() {
  state.turns = [];
  views.chat.clear();
  $("message").focus();
  draw();
}

window.addEventListener("keydown", (event) => {
  if (!info || $("ask").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  } else if (event.key === "Escape") {
    tip.hide();
    if (state.running) stop();
    else view().choose(null);
  }
});

function repaint() {
  for (const each of Object.values(views ?? {})) each.repaint();
}

$("theme").addEventListener("click", () => {
  otherTheme();
  repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

function connect() {
  for (const mode of ["write", "chat"]) {
    $(mode).querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    $(mode).querySelector(".stop").addEventListener("click", stop);
  }
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("add").addEventListener("click", () => able($("add")) && addToPrompt());
  $("new").addEventListener("click", () => able($("new")) && newChat());
  for (const button of $("switch").children) button.addEventListener("click", () => show(button.dataset.mode));
}

// ------------------------------------------------------------------ start

async function start() {
  $("again").hidden = true;
  $("start-problem").textContent = "";
  try {
    info = await ask("v1/weft").then((response) => response.json());
  } catch (error) {
    $("start-problem").textContent = error instanceof Problem ? error.message : "The server answers, but is not one of weft's: it has no /v1/weft.";
    $("again").hidden = false;
    return;
  }
  group = { experts: info.experts, colours: info.experts.map((_, expert) => expert) };
  document.title = `${visible(info.name)} · weft`;
  $("title").textContent = visible(info.name);
  $("runs").replaceChildren(...[info.scheme, info.engine, info.base].map((fact) => element("span", {}, visible(String(fact)))));
  $("switch").hidden = !info.chat;
  $("start").hidden = true;
  document.querySelector("main").hidden = false;
  settings = new Settings(info, group, palette);
  views = Object.fromEntries(["write", "chat"].map((mode) => [mode, new Answers($(mode).querySelector(".answers"), group, palette, tip, tellChosen)]));
  connect();
  show("write");
  $("prompt").focus();
}

$("again").addEventListener("click", start);
start();
