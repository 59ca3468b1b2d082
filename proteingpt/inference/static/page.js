// The page: proteins and the conversation live here, in the browser, and nowhere else. The server reads a file once and
// gives the protein back; it is sent along with each question. Every text is set as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const proteins = []; // as /read gives them, with the file they came from
const exchanges = []; // {protein, question, answer, missing}, as they are saved
let about = null;
let current = null;
let viewer = null;
let asking = null; // AbortController of the answer that is coming
let reading = 0; // the last file asked for: an older one that comes later is dropped

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function complain(message) {
  $("trouble").textContent = message || "";
  $("trouble").hidden = !message;
}

// The response, or its own words as an error.
async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is launch/chat.py still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Error(said.error || `The server answers ${response.status}.`);
}

// ------------------------------------------------------------------------------------------------------------- proteins

async function read({ file, sequence, chain, replace }) {
  const mine = ++reading;
  complain("");
  document.body.style.cursor = "progress";
  try {
    if (file && file.size > about.upload_bytes) {
      throw new Error(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB; ${about.upload_bytes / 2 ** 20} MB are the most.`);
    }
    if (file && file.size === 0) throw new Error(`${file.name}: the file is empty.`);
    const query = new URLSearchParams();
    if (file) query.set("name", file.name);
    if (chain) query.set("chain", chain);
    if (sequence) query.set("sequence", sequence);
    const response = await request(`/read?${query}`, { method: "POST", body: file || "" });
    const found = { ...(await response.json()), file };
    if (mine !== reading) return;
    add(found, replace);
    if (sequence) typed("");
  } catch (error) {
    if (mine === reading) complain(error.message);
  } finally {
    if (mine === reading) document.body.style.cursor = "";
    if (current) showChains(); // the choice goes back to what is shown
  }
}

function add(found, replace) {
  const place = replace ? proteins.indexOf(replace) : -1;
  const others = proteins.filter((one) => one !== replace).map((one) => one.name);
  const wanted = found.name;
  for (let number = 2; others.includes(found.name); number++) found.name = `${wanted}-${number}`;
  if (place < 0) proteins.push(found);
  else proteins[place] = found;
  use(found);
}

// The sequence that is being typed or pasted, and what can be done with it.
function typed(text) {
  if (text !== undefined) $("sequence").value = text;
  $("uses").hidden = !$("sequence").value.trim();
  $("with").hidden = !(current && current.pdb !== null);
  $("with").textContent = current ? `Use it with the structure of ${current.name}` : "";
}

function use(protein) {
  current = protein;
  typed();
  $("proteins").replaceChildren(...proteins.map((one) => {
    const button = element("button", "", one.name);
    button.type = "button";
    button.setAttribute("aria-pressed", String(one === current));
    button.addEventListener("click", () => use(one));
    return button;
  }));
  $("proteins").hidden = proteins.length < 2;
  $("protein").hidden = false;
  $("summary").textContent = protein.summary;
  $("missing").replaceChildren(...protein.missing.map((note) => element("li", "", note)));
  showChains();
  showLetters();
  show();
  $("question").disabled = false;
  $("send").disabled = asking !== null;
  $("question").placeholder = `Ask about ${protein.name}`;
  $("empty").textContent = `Ask about ${protein.name}.`;
}

function showChains() {
  $("chains").hidden = current.chains.length < 2;
  $("chain").replaceChildren(...current.chains.map((name) => {
    const option = element("option", "", name);
    option.value = name;
    return option;
  }));
  $("chain").value = current.protein.chain;
}

function showLetters() {
  const absent = new Set(current.pdb === null ? [] : current.unresolved);
  $("letters").replaceChildren(...[...current.protein.sequence].map((letter, i) => {
    const span = element("span", absent.has(i) ? "absent" : "", letter);
    span.title = `${letter} ${i + 1}${absent.has(i) ? ", without coordinates" : ""}`;
    if (!absent.has(i)) span.addEventListener("click", () => point(i + 1));
    return span;
  }));
}

// --------------------------------------------------------------------------------------------------------------- viewer

const PLDDT = [[90, "#0053d6"], [70, "#65cbf3"], [50, "#ffdb13"], [-1, "#ff7d45"]]; // as AlphaFold DB colours it

function background() {
  return getComputedStyle($("viewer")).backgroundColor.match(/\d+/g).slice(0, 3).reduce((n, part) => n * 256 + Number(part), 0);
}

function show() {
  const drawn = current.pdb !== null;
  $("viewer").hidden = !drawn;
  $("legend").textContent = drawn ? "" : "There is nothing to draw without coordinates.";
  if (!drawn) return;
  try {
    viewer = viewer || window.$3Dmol.createViewer($("viewer"), { backgroundColor: background() });
    viewer.clear();
    viewer.setBackgroundColor(background());
    viewer.addModel(current.pdb, "pdb");
    style();
    viewer.zoomTo({ chain: "A" });
    viewer.render();
    viewer.resize();
  } catch (error) {
    console.error(error);
    viewer = null;
    $("viewer").hidden = true;
    $("legend").textContent = "This browser cannot draw in 3D (no WebGL). Questions work all the same.";
  }
}

function style() {
  const rainbow = new window.$3Dmol.Gradient.ROYGB(current.protein.sequence.length, 1);
  const colour = current.predicted
    ? { colorfunc: (atom) => PLDDT.find(([least]) => atom.b > least)[1] }
    : { colorfunc: (atom) => rainbow.valueToHex(atom.resi) };
  viewer.setStyle({}, { cartoon: { color: "#9aa7b4", opacity: 0.45 } });
  viewer.setStyle({ chain: "A" }, { cartoon: colour });
  const others = current.chains.length > 1 ? " Other chains are grey, and not shown to the model." : "";
  $("legend").textContent = (current.predicted
    ? "Coloured by confidence (pLDDT): blue above 90, light blue above 70, yellow above 50, orange below."
    : "Coloured from the first residue (blue) to the last (red).") + others;
}

function point(residue) {
  if (!viewer || current.pdb === null) return;
  style();
  viewer.addStyle({ chain: "A", resi: residue }, { stick: { radius: 0.25 }, sphere: { scale: 0.3 } });
  viewer.zoomTo({ chain: "A", resi: [residue - 4, residue, residue + 4] }, 400);
  viewer.render();
}

// --------------------------------------------------------------------------------------------------------- conversation

async function ask(question) {
  const protein = current;
  asking = new AbortController();
  $("empty").hidden = true;
  $("send").disabled = true;
  $("stop").hidden = false;
  const answer = element("div", "answer waiting", "");
  $("log").append(element("div", "of", protein.name), element("div", "question", question), answer);
  const kept = { protein: protein.name, question, answer: "", missing: protein.missing };
  try {
    await listen(protein, question, kept, answer);
  } catch (error) {
    if (error.name === "AbortError") kept.answer += " [stopped]";
    else answer.after(element("p", "trouble", error.message));
  }
  answer.textContent = kept.answer;
  answer.classList.remove("waiting");
  answer.hidden = !kept.answer;
  if (kept.answer) exchanges.push(kept);
  asking = null;
  $("send").disabled = false;
  $("stop").hidden = true;
  $("save-json").disabled = $("save-markdown").disabled = exchanges.length === 0;
  $("log").scrollTop = $("log").scrollHeight;
}

// Lines of JSON: pieces as they come, at the end the whole answer.
async function listen(protein, question, kept, answer) {
  const response = await request("/ask", {
    method: "POST",
    signal: asking.signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ protein: protein.protein, question }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const said = JSON.parse(line);
      if (said.error !== undefined) throw new Error(said.error);
      if (said.answer !== undefined) {
        kept.answer = said.answer;
        return;
      }
      kept.answer += said.piece || "";
      answer.textContent = kept.answer;
      $("log").scrollTop = $("log").scrollHeight;
    }
  }
}

async function save(as, name) {
  try {
    const response = await request("/save", { method: "POST", body: JSON.stringify({ as, exchanges }) });
    const link = element("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  } catch (error) {
    $("log").append(element("p", "trouble", error.message));
  }
}

// ---------------------------------------------------------------------------------------------------------------- wiring

function wire() {
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) read({ file });
    $("file").value = "";
  });
  $("open").addEventListener("submit", (event) => {
    event.preventDefault();
    const sequence = $("sequence").value.trim();
    if (sequence) read({ sequence });
    else complain("Paste a sequence first: one letter for each residue.");
  });
  $("with").addEventListener("click", () => {
    read({ file: current.file, chain: current.protein.chain, sequence: $("sequence").value.trim() });
  });
  $("sequence").addEventListener("input", () => typed());
  $("sequence").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("open").requestSubmit();
    }
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) read({ file: event.dataTransfer.files[0] });
    });
  }
  $("chain").addEventListener("change", () => read({ file: current.file, chain: $("chain").value, replace: current }));
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || !current || asking) return;
    if (question.length > about.question_letters) return;
    $("question").value = "";
    ask(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => asking && asking.abort());
  $("save-json").addEventListener("click", () => save("json", "conversation.json"));
  $("save-markdown").addEventListener("click", () => save("markdown", "conversation.md"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (viewer) viewer.setBackgroundColor(background());
  });
  new ResizeObserver(() => viewer && !$("viewer").hidden && viewer.resize()).observe($("viewer"));
  window.addEventListener("beforeunload", (event) => exchanges.length && event.preventDefault());
}

async function start() {
  wire();
  try {
    about = await (await request("/about")).json();
  } catch (error) {
    return complain(error.message);
  }
  $("model").textContent = about.model;
  $("question").maxLength = about.question_letters;
  $("note").textContent = `${about.note} No file that you open is kept by the server.`;
  document.body.dataset.ready = "yes";
}

start();
