"use strict";

// What knows nothing of the document comes first; the tests run it under Node.

const ROW = 36;
const PRUNED_ROW = 27;
const HEAD = 26;
const GAP = 32;
const NARROWEST = 54;
const LONGEST = 18;
const PRUNED = { threshold: true, budget: true, breadth: true };
const MARKS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };

// Text as parts {text, mark}: where `mark` holds, the part stands for what could not be seen.
function visible(text) {
  if (text === "") {
    return [{ text: "∅", mark: true }];
  }
  const parts = [];
  for (const character of text) {
    let mark = true;
    let shown = MARKS[character];
    if (shown === undefined) {
      mark = /[\p{C}\p{Z}]/u.test(character);
      const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      shown = mark ? `⟨${code}⟩` : character;
    }
    const last = parts[parts.length - 1];
    if (last !== undefined && last.mark === mark) {
      last.text += shown;
    } else {
      parts.push({ text: shown, mark });
    }
  }
  return parts;
}

function plain(parts) {
  return parts.map((part) => part.text).join("");
}

// The first `most` characters of `parts`, the last of them an ellipsis if there are more.
function shortened(parts, most) {
  const characters = parts.flatMap((part) =>
    [...part.text].map((text) => ({ text, mark: part.mark })));
  if (characters.length <= most) {
    return parts;
  }
  const kept = [];
  for (const one of characters.slice(0, most - 1)) {
    const last = kept[kept.length - 1];
    if (last !== undefined && last.mark === one.mark) {
      last.text += one.text;
    } else {
      kept.push({ ...one });
    }
  }
  return [...kept, { text: "…", mark: true }];
}

// Columns that a monospaced font gives to `text`: characters of East Asia take two.
function columnsOf(text) {
  let columns = 0;
  for (const character of text) {
    columns += /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\u{1f000}-\u{3ffff}]/u
      .test(character) ? 2 : 1;
  }
  return columns;
}

// A probability with two digits that count.
function percent(probability) {
  const value = 100 * probability;
  if (value >= 99.95) {
    return "100 %";
  }
  return `${value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : "<0.1"} %`;
}

// Of a node: given its parent, and of its whole path; the draft's own, where the draft gave it.
// Rounding may bring the first above 1.
function probabilities(round, index) {
  const node = round.nodes[index];
  const parent = round.nodes[node.parent];
  const [own, before] = node.draft === null
    ? [node.log_prob, parent.log_prob] : [node.draft, parent.draft];
  return { step: Math.min(1, Math.exp(own - before)), path: Math.exp(own) };
}

// Who gave a node: the draft, an n-gram, or the draft with an n-gram that raised it.
function sourceOf(node) {
  if (node.draft === null) {
    return "ngram";
  }
  return node.draft < node.log_prob ? "both" : "draft";
}

// Indices of the root and the accepted nodes, from shallow to deep.
function acceptedPath(round) {
  const path = [0];
  round.nodes.forEach((node, index) => {
    if (node.fate === "accepted" && node.parent === path[path.length - 1]) {
      path.push(index);
    }
  });
  return path;
}

// Counts of a round. `accepted` are those committed: a sequence may end in the middle of a path.
function countsOf(round) {
  const offered = acceptedPath(round).length - 1;
  const counts = { verified: 0, threshold: 0, budget: 0, breadth: 0, committed: round.committed.length };
  for (const node of round.nodes.slice(1)) {
    counts[node.choice === null ? node.fate : "verified"] += 1;
  }
  counts.accepted = Math.min(offered, counts.committed);
  counts.bonus = counts.committed > offered ? 1 : 0;
  return counts;
}

// Whether a pruned node would have been accepted.
function wanted(round, index) {
  const node = round.nodes[index];
  const parent = round.nodes[node.parent];
  return node.fate in PRUNED && (parent.fate === "accepted" || parent.fate === "root")
    && parent.choice === node.token;
}

function amount(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// Why nodes were pruned.
function reasons(rule) {
  return {
    threshold: `below the threshold of ${Number((100 * rule.threshold).toPrecision(3))} %`,
    budget: `over the budget of ${amount(rule.budget, "node")}`,
    breadth: "beyond the children that the strategy gives their parent",
  };
}

// A round in one sentence.
function summary(round, rule) {
  const counts = countsOf(round);
  const committed = `${amount(counts.committed, "token")} committed`;
  if (round.rule === null) {
    return `No draft in this round: ${committed}, the target’s own.`;
  }
  const words = reasons(rule);
  const pruned = Object.keys(PRUNED).filter((fate) => counts[fate] > 0)
    .map((fate) => `${counts[fate]} ${words[fate]}`);
  return [
    `${amount(counts.verified, "node")} verified in one forward`,
    pruned.length > 0 ? `pruned: ${pruned.join(", ")}` : "nothing pruned",
    `${counts.accepted} accepted`,
    committed + (counts.bonus ? ", the last by the target itself" : ", where the text ends"),
  ].join("; ") + ".";
}

// What the tooltip of a node says: its token, and lines. `index` is null for the bonus token.
function details(round, rule, vocabulary, index) {
  const text = (token) => `“${plain(visible(vocabulary[token]))}”`;
  if (index === null) {
    const path = acceptedPath(round);
    const last = path[path.length - 1];
    const token = round.nodes[last].choice;
    const pruned = round.nodes.some((node, at) => node.parent === last && wanted(round, at));
    return {
      token,
      lines: [
        `The target’s own choice after ${text(round.nodes[last].token)}, which its verification `
          + "gives for nothing.",
        ...(pruned ? ["The draft had it too, but it was pruned."] : []),
      ],
    };
  }
  const node = round.nodes[index];
  if (index === 0) {
    return { token: node.token, lines: ["The last committed token: the draft starts from it."] };
  }
  const { step, path } = probabilities(round, index);
  const parent = round.nodes[node.parent];
  const lines = [
    `${node.draft === null ? "Assumed of an n-gram" : "Draft"}: ${percent(step)} after its `
      + `parent, ${percent(path)} for the path.`,
  ];
  if (node.fate === "accepted") {
    lines.push("Accepted: the target chooses it here.");
  } else if (node.fate !== "refused") {
    const words = reasons(rule)[node.fate].replace("their parent", "its parent");
    lines.push(`Pruned: ${words}. The target never read it.`);
    if (wanted(round, index)) {
      lines.push("The target would have taken it.");
    }
  } else if (node.token === parent.choice) {
    lines.push("Refused: the target agrees, but not with the tokens before.");
  } else {
    lines.push(`Refused: the target chooses ${text(parent.choice)} here.`);
  }
  if (sourceOf(node) !== "draft") {
    lines.push("An n-gram: so the text went on when the last tokens occurred before.");
  }
  if (node.choice !== null) {
    lines.push(`After it the target goes on with ${text(node.choice)}.`);
  }
  return { token: node.token, lines };
}

// Where everything is drawn. From left to right by depth; the first child stands in the row of its
// parent, the others as high below it as there is room at every depth, the most probable first. So
// lines never cross. The bonus token continues the accepted path.
function layout(round, vocabulary, { showPruned, probability }) {
  const path = acceptedPath(round);
  const counts = countsOf(round);
  const children = round.nodes.map(() => []);
  round.nodes.forEach((node, index) => {
    if (index > 0 && (showPruned || !(node.fate in PRUNED))) {
      children[node.parent].push(index);
    }
  });
  for (const each of children) {
    each.sort((a, b) => round.nodes[b].log_prob - round.nodes[a].log_prob || a - b);
  }
  const widths = [];
  function box(index, parent, depth) {
    const bonus = index === null;
    const token = bonus ? round.committed[counts.committed - 1].token : round.nodes[index].token;
    const fate = bonus ? "bonus" : round.nodes[index].fate;
    const pruned = fate in PRUNED;
    const label = shortened(visible(vocabulary[token]), LONGEST);
    const number = bonus || index === 0 ? "" : percent(probabilities(round, index)[probability]);
    const character = pruned ? 7.3 : 7.9;
    const textWidth = columnsOf(plain(label)) * character;
    const width = Math.ceil(textWidth + number.length * 6.7 + (number === "" ? 20 : 29));
    widths[depth] = Math.max(widths[depth] || NARROWEST, width);
    return {
      index, parent, depth, label, number, width, pruned, fate,
      middle: 0,
      height: pruned ? PRUNED_ROW - 6 : ROW - 9,
      source: bonus ? "draft" : sourceOf(round.nodes[index]),
      wanted: !bonus && wanted(round, index),
      weight: bonus || index === 0 ? 1 : probabilities(round, index).step,
    };
  }
  // A node with all below it, the node at height 0: its boxes, and the upper and lower edge of the
  // whole at each depth. Depth is bounded: no stack grows with the text.
  function block(index, parent, depth) {
    const entry = box(index, parent, depth);
    const half = (entry.pruned ? PRUNED_ROW : ROW) / 2;
    const whole = { boxes: [entry], upper: [], lower: [] };
    whole.upper[depth] = -half;
    whole.lower[depth] = half;
    const next = index === null ? [] : [...children[index]];
    if (counts.bonus && index === path[path.length - 1]) {
      next.unshift(null);
    }
    next.forEach((child, rank) => {
      const part = block(child, entry, depth + 1);
      let down = 0;
      part.upper.forEach((edge, at) => {
        if (rank > 0 && whole.lower[at] !== undefined) {
          down = Math.max(down, whole.lower[at] - edge);
        }
      });
      part.boxes.forEach((one) => { one.middle += down; });
      part.lower.forEach((edge, at) => {
        whole.upper[at] ??= part.upper[at] + down;
        whole.lower[at] = edge + down;
      });
      whole.boxes.push(...part.boxes);
    });
    return whole;
  }
  const { boxes, lower } = block(0, null, 0);
  const root = HEAD + ROW / 2;
  const height = root + Math.max(...lower.filter((edge) => edge !== undefined)) + 6;
  const lefts = [];
  widths.reduce((left, width, depth) => {
    lefts[depth] = left;
    return left + width + GAP;
  }, 2);
  for (const entry of boxes) {
    entry.left = lefts[entry.depth];
    entry.middle += root;
  }
  const deepest = widths.length - 1;
  return {
    boxes, lefts, height,
    width: lefts[deepest] + widths[deepest] + 8,
  };
}

// Where in the page one is, as the part of its address after #, and back.
function toAddress(state) {
  return [state.configuration, state.prompt + 1, state.round + 1].map(encodeURIComponent).join("/");
}

function fromAddress(address, data) {
  const [name, prompt, round] = address.replace(/^#/, "").split("/").map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return "";
    }
  });
  const found = data.configurations.findIndex((each) => each.name === name);
  const index = Math.max(0, found);
  const prompts = data.configurations[index].prompts;
  const within = (text, count) => Math.min(Math.max(0, (parseInt(text, 10) || 1) - 1), count - 1);
  const at = within(prompt, prompts.length);
  return {
    configuration: data.configurations[index].name,
    prompt: at,
    round: Math.max(0, within(round, prompts[at].rounds.length)),
  };
}

// The rest is the page.

function start(document, window) {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const svg = get("tree");
  const options = { showPruned: true, probability: "step" };
  let state = fromAddress(window.location.hash, data);
  let current = null;
  let groups = [];

  const configuration = () => data.configurations.find((one) => one.name === state.configuration);
  const prompt = () => configuration().prompts[state.prompt];
  const round = () => prompt().rounds[state.round];
  const rule = () => (round().rule === null ? null : configuration().rules[round().rule]);

  function element(name, kind, text) {
    const made = document.createElement(name);
    if (kind) {
      made.className = kind;
    }
    if (text !== undefined) {
      made.textContent = text;
    }
    return made;
  }

  function shape(name, attributes, parent) {
    const made = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, value);
    }
    parent.append(made);
    return made;
  }

  function select(id, labels, chosen) {
    get(id).replaceChildren(...labels.map((label, index) => {
      const option = element("option", "", label);
      option.value = String(index);
      option.selected = index === chosen;
      return option;
    }));
  }

  function showChoices() {
    const names = data.configurations.map((one) => one.name);
    select("configuration", names, names.indexOf(state.configuration));
    const texts = configuration().prompts.map((one, index) =>
      `${index + 1}. ${plain(shortened([{ text: one.text, mark: false }], 60))}`);
    select("prompt", texts, state.prompt);
    get("strategy").replaceChildren(
      element("b", "", configuration().name),
      `: ${configuration().strategy}`,
    );
  }

  function showStrip() {
    const rounds = prompt().rounds;
    const most = Math.max(1, ...rounds.map((one) => one.committed.length));
    get("strip").replaceChildren(...rounds.map((one, index) => {
      const counts = countsOf(one);
      const button = element("button");
      button.type = "button";
      const name = `Round ${index + 1}: ${amount(counts.committed, "token")}`;
      button.title = name;
      button.setAttribute("aria-label", name);
      for (const [kind, count] of [["bonus", counts.bonus], ["", counts.accepted]]) {
        const part = element("i", kind);
        part.style.height = `${(38 * count) / most}px`;
        button.append(part);
      }
      button.addEventListener("click", () => go(index));
      return button;
    }));
  }

  function markStrip() {
    [...get("strip").children].forEach((button, index) => {
      button.setAttribute("aria-current", String(index === state.round));
      // One stop for the tab key; the arrows do the rest.
      button.tabIndex = index === state.round ? 0 : -1;
    });
  }

  function showText() {
    const parts = [element("span", "prompt", prompt().text)];
    const before = prompt().rounds.slice(0, state.round).flatMap((one) => one.committed);
    const words = [prompt().first, ...before].map((one) => one.text).join("");
    parts.push(element("span", "", words));
    const now = prompt().rounds.length === 0 ? [] : round().committed;
    const accepted = prompt().rounds.length === 0 ? 0 : countsOf(round()).accepted;
    now.forEach((one, index) => {
      const token = element("span", index < accepted ? "token" : "token bonus");
      append(token, visible(data.vocabulary[one.token]));
      // A token that ends a line still ends it.
      parts.push(token, one.text.replace(/[^\n]/g, ""));
    });
    get("text").replaceChildren(...parts);
    get("text").scrollTop = get("text").scrollHeight;
  }

  function append(parent, parts) {
    for (const part of parts) {
      parent.append(element("span", part.mark ? "mark" : "", part.text));
    }
  }

  function curve(entry) {
    const from = entry.parent;
    const x = from.left + from.width;
    if (from.middle === entry.middle) {
      return `M${x} ${from.middle}H${entry.left}`;
    }
    // Where a column is wider than the parent, the line is straight up to the gap.
    const bend = Math.max(x, entry.left - GAP);
    const half = (entry.left + bend) / 2;
    return `M${x} ${from.middle}H${bend}C${half} ${from.middle} ${half} ${entry.middle} `
      + `${entry.left} ${entry.middle}`;
  }

  function kindOf(entry) {
    return entry.pruned ? `pruned${entry.wanted ? " wanted" : ""}` : entry.fate;
  }

  function draw() {
    svg.replaceChildren();
    groups = [];
    hideTip();
    if (prompt().rounds.length === 0) {
      svg.setAttribute("width", 0);
      svg.setAttribute("height", 0);
      return;
    }
    const plan = layout(round(), data.vocabulary, options);
    svg.setAttribute("width", plan.width);
    svg.setAttribute("height", plan.height);
    svg.setAttribute("viewBox", `0 0 ${plan.width} ${plan.height}`);
    plan.lefts.forEach((left, depth) => {
      shape("line", { class: "rule", x1: left, x2: left, y1: 18, y2: plan.height }, svg);
      const name = shape("text", { class: "depth", x: left, y: 12 }, svg);
      name.textContent = depth === 0 ? "root" : `depth ${depth}`;
    });
    // The accepted path is drawn last, over the others.
    const order = [...plan.boxes].sort((a, b) => importance(a) - importance(b));
    for (const entry of order.filter((one) => one.parent !== null)) {
      const width = entry.fate === "accepted" || entry.fate === "bonus" ? 3.2 : 0.9 + 1.8 * entry.weight;
      shape("path", { class: kindOf(entry), d: curve(entry), "stroke-width": width }, svg);
    }
    for (const entry of plan.boxes) {
      groups.push(drawBox(entry));
    }
    rove(0);
  }

  function importance(entry) {
    return { accepted: 2, bonus: 2, refused: 1 }[entry.fate] || 0;
  }

  function drawBox(entry) {
    const group = shape("g", { class: `node ${kindOf(entry)}`, role: "img" }, svg);
    const top = entry.middle - entry.height / 2;
    const size = { x: entry.left, y: top, width: entry.width, height: entry.height, rx: 6 };
    shape("rect", size, group);
    const text = shape("text", { x: entry.left + 10, y: entry.middle + 4.5 }, group);
    for (const part of entry.label) {
      shape("tspan", part.mark ? { class: "mark" } : {}, text).textContent = part.text;
    }
    if (entry.number !== "") {
      const right = entry.left + entry.width - 9;
      const place = { class: "probability", x: right, y: entry.middle + 4, "text-anchor": "end" };
      shape("text", place, group).textContent = entry.number;
    }
    if (entry.source !== "draft") {
      const place = { cx: entry.left + entry.width - 2, cy: top + 2, r: 4.5 };
      shape("circle", { class: entry.source, ...place }, group);
    }
    const said = details(round(), rule(), data.vocabulary, entry.index);
    const name = plain(visible(data.vocabulary[said.token]));
    group.setAttribute("aria-label", `${name}, depth ${entry.depth}. ${said.lines.join(" ")}`);
    group.addEventListener("mouseenter", () => showTip(group, said));
    group.addEventListener("mouseleave", hideTip);
    group.addEventListener("focus", () => showTip(group, said));
    group.addEventListener("blur", hideTip);
    return group;
  }

  // One node takes part in the tab order; the arrows move it.
  function rove(index) {
    current = index;
    groups.forEach((group, at) => group.setAttribute("tabindex", at === index ? "0" : "-1"));
  }

  function showTip(group, said) {
    const tip = get("tip");
    const head = element("b");
    append(head, visible(data.vocabulary[said.token]));
    tip.replaceChildren(head, ` token ${said.token}`,
      ...said.lines.map((line) => element("p", "", line)));
    tip.hidden = false;
    const at = group.querySelector("rect").getBoundingClientRect();
    const below = at.bottom + 8 + tip.offsetHeight < window.innerHeight;
    const left = Math.min(at.left, window.innerWidth - tip.offsetWidth - 12);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - tip.offsetHeight - 8)}px`;
  }

  function hideTip() {
    get("tip").hidden = true;
  }

  function show() {
    const count = prompt().rounds.length;
    get("where").textContent = count === 0 ? "no rounds" : `Round ${state.round + 1} of ${count}`;
    get("first").disabled = get("back").disabled = state.round === 0;
    get("last").disabled = get("forward").disabled = state.round >= count - 1;
    get("summary").textContent = count === 0
      ? "The prefill alone gave all tokens." : summary(round(), rule());
    markStrip();
    showText();
    draw();
    window.history.replaceState(null, "", `#${toAddress(state)}`);
  }

  function go(index) {
    const inTree = svg.contains(document.activeElement);
    state.round = Math.max(0, Math.min(index, prompt().rounds.length - 1));
    show();
    if (inTree && groups.length > 0) {
      groups[0].focus();
    }
  }

  // Another configuration or prompt: from its first round on.
  function choose(changed) {
    const same = configuration();
    state = { ...state, round: 0, ...changed };
    if (configuration() !== same) {
      state.prompt = Math.min(state.prompt, configuration().prompts.length - 1);
    }
    showAll();
  }

  function showAll() {
    showChoices();
    showStrip();
    show();
  }

  function showFacts() {
    const facts = data.facts;
    const dirty = facts.dirty ? " with changes" : "";
    get("facts").textContent = [
      `Pair ${facts.pair} in ${facts.dtype}, greedy decoding`,
      facts.device === null ? "" : `recorded on ${facts.device}`,
      facts.recorded,
      facts.commit === null ? "" : `commit ${facts.commit.slice(0, 12)}${dirty}`,
      data.configurations.map((one) => `${one.name}: specification ${one.spec.slice(0, 12)}`)
        .join(", "),
    ].filter((part) => part !== "").join(" · ");
  }

  const KEYS = {
    ArrowLeft: () => go(state.round - 1),
    ArrowRight: () => go(state.round + 1),
    Home: () => go(0),
    End: () => go(prompt().rounds.length - 1),
    ArrowUp: () => walk(-1),
    ArrowDown: () => walk(1),
    Escape: hideTip,
  };

  function walk(step) {
    if (groups.length > 0) {
      const inside = svg.contains(document.activeElement);
      rove(inside ? Math.max(0, Math.min(current + step, groups.length - 1)) : current);
      groups[current].focus();
    }
  }

  document.addEventListener("keydown", (event) => {
    const modified = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey;
    if (modified || event.target.tagName === "SELECT" || !(event.key in KEYS)) {
      return;
    }
    event.preventDefault();
    KEYS[event.key]();
  });
  get("first").addEventListener("click", KEYS.Home);
  get("back").addEventListener("click", KEYS.ArrowLeft);
  get("forward").addEventListener("click", KEYS.ArrowRight);
  get("last").addEventListener("click", KEYS.End);
  get("configuration").addEventListener("change", (event) =>
    choose({ configuration: data.configurations[Number(event.target.value)].name }));
  get("prompt").addEventListener("change", (event) =>
    choose({ prompt: Number(event.target.value) }));
  get("probability").addEventListener("change", (event) => {
    options.probability = event.target.value;
    draw();
  });
  get("pruned").addEventListener("change", (event) => {
    options.showPruned = event.target.checked;
    draw();
  });
  window.addEventListener("hashchange", () => {
    state = fromAddress(window.location.hash, data);
    showAll();
  });
  options.showPruned = get("pruned").checked;
  options.probability = get("probability").value;
  showFacts();
  showAll();
}

if (typeof document === "undefined") {
  module.exports = {
    acceptedPath, columnsOf, countsOf, details, fromAddress, layout, percent, plain, shortened,
    summary, toAddress, visible, wanted,
  };
} else {
  start(document, window);
}
