"use strict";
// Adds to the page what hovering and arrow keys show. Everything is set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const views = [...document.querySelectorAll(".passage")].map((root) => ({
    root,
    text: root.querySelector(".text"),
    tokens: [...root.querySelectorAll(".text > span")],
    svg: root.querySelector(".map svg"),
    names: [...root.querySelectorAll(".names li")],
  }));
  const ranges = data.passages.map((passage) => passage.logits.map((row) => {
    const known = row.filter((value) => value !== null);
    return [Math.min(...known), Math.max(...known)];
  }));
  let passage = 0, token = 0, block = 0;

  const make = (parent, tag, text, name) => {
    const element = parent.appendChild(document.createElement(tag));
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const visible = (piece) => piece.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "·";
  const number = (value, digits = 3) => value === null || value === undefined ? "none" : value.toFixed(digits);
  const taken = (index, row) => data.passages[passage].taken[index][row] === "1";
  // Where a logit lies between the least and the greatest of its block in this passage.
  const place = (index, row) => {
    const [low, high] = ranges[passage][index], value = data.passages[passage].logits[index][row];
    return value === null || high === low ? 0 : (value - low) / (high - low);
  };

  function show(row, index = block) {
    const view = views[passage], known = data.passages[passage];
    for (const old of view.root.querySelectorAll(".here")) old.classList.remove("here");
    token = row; block = index;
    view.tokens[token].classList.add("here");
    view.names[block].classList.add("here");
    const column = view.svg.querySelector(".column"), line = view.svg.querySelector(".line");
    column.setAttribute("x", token); column.setAttribute("width", 1);
    line.setAttribute("y", block); line.setAttribute("height", 1);

    const count = known.taken.filter((marks) => marks[token] === "1").length;
    $("piece").textContent = visible(view.tokens[token].textContent);
    const facts = [["position", token], ["token", known.ids[token]], ["kind", data.kinds[known.kinds[token]]],
      ["in the text", known.counts[token] === 1 ? "once" : `${known.counts[token]} times`],
      ["blocks", `${count} of ${data.blocks.length}`]];
    if (known.entropy) facts.push(["entropy here", `${number(known.entropy[token], 2)} nats`]);
    if (known.loss && token < known.loss.length) facts.push(["loss of the next", `${number(known.loss[token], 2)} nats`]);
    $("facts").replaceChildren();
    for (const [name, value] of facts) { make($("facts"), "dt", name); make($("facts"), "dd", value); }
    $("logits").replaceChildren();
    data.blocks.forEach((name, i) => {
      const item = make($("logits"), "li", undefined, (taken(i, token) ? "taken " : "") + (i === block ? "here" : ""));
      make(item, "span", name, "name").title = `block ${name}`;
      make(make(item, "span", undefined, "track"), "i").style.width = `${100 * place(i, token)}%`;
      make(item, "span", number(known.logits[i][token]), "value");
      const mark = make(item, "span", taken(i, token) ? "●" : "○", "mark");
      mark.setAttribute("role", "img");
      mark.setAttribute("aria-label", taken(i, token) ? "chosen" : "passes by");
      item.addEventListener("click", () => shadeBy(i));
    });
  }

  function say() {
    const known = data.passages[passage];
    $("said").textContent = `${visible(views[passage].tokens[token].textContent)}, position ${token}, block ` +
      `${data.blocks[block]}: logit ${number(known.logits[block][token])}, ${taken(block, token) ? "chosen" : "passes by"}`;
  }

  function shade() {
    const only = Number($("shade").value);
    $("low").textContent = only < 0 ? "no block" : "lowest logit";
    $("high").textContent = only < 0 ? "every block" : "highest logit; underlined: chosen";
    views[passage].tokens.forEach((element, row) => {
      const heat = only < 0 ? data.passages[passage].taken.filter((marks) => marks[row] === "1").length / data.blocks.length
        : place(only, row);
      element.style.setProperty("--h", heat.toFixed(2));
      element.classList.toggle("taken", only >= 0 && taken(only, row));
    });
  }

  function shadeBy(index) {
    $("shade").value = String(index);
    shade();
    show(token, index);
  }

  function turnTo(index) {
    passage = index;
    views.forEach((view, i) => { view.root.hidden = i !== index; });
    shade();
    show(Math.min(token, views[index].tokens.length - 1));
  }

  function reveal() {
    views[passage].tokens[token].scrollIntoView({ block: "nearest", inline: "nearest" });
    const scroll = views[passage].svg.parentElement, at = (token + .5) / views[passage].tokens.length * scroll.scrollWidth;
    if (at < scroll.scrollLeft || at > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = at - scroll.clientWidth / 2;
  }

  views.forEach((view, index) => {
    const over = (event) => {
      const row = view.tokens.indexOf(event.target);
      if (row >= 0) show(row);
    };
    view.text.addEventListener("pointerover", over);
    view.text.addEventListener("pointerdown", over);
    const point = (event) => {
      const box = view.svg.getBoundingClientRect();
      const row = Math.floor((event.clientX - box.left) / box.width * view.tokens.length);
      const line = Math.floor((event.clientY - box.top) / box.height * data.blocks.length);
      if (view.tokens[row] && data.blocks[line] !== undefined) show(row, line);
    };
    view.svg.addEventListener("pointermove", point);
    view.svg.addEventListener("pointerdown", (event) => { point(event); reveal(); });
    view.names.forEach((name, i) => name.addEventListener("click", () => shadeBy(i)));
    view.text.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const last = view.tokens.length - 1, lines = data.blocks.length;
      const moves = { ArrowLeft: [Math.max(token - 1, 0), block], ArrowRight: [Math.min(token + 1, last), block],
        ArrowUp: [token, (block + lines - 1) % lines], ArrowDown: [token, (block + 1) % lines],
        Home: [0, block], End: [last, block] };
      if (!(event.key in moves) || index !== passage) return;
      event.preventDefault();
      show(...moves[event.key]);
      if (Number($("shade").value) >= 0) { $("shade").value = String(block); shade(); }
      reveal();
      say();
    });
  });
  $("passage").addEventListener("change", () => turnTo(Number($("passage").value)));
  $("shade").addEventListener("change", () => { shade(); show(token, Math.max(Number($("shade").value), 0)); });
  document.documentElement.classList.add("js");
  document.querySelector(".controls").hidden = false;
  $("inspector").hidden = false;
  turnTo(0);
})();
