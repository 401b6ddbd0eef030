// Drawing. Names are strangers' text: they are set as textContent, never as markup.
{
  const ROW = 26, SPARE = 12, CUT = 400, FEW = 40;
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  root.classList.add("js");

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") element.textContent = value;
      else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== false) element.setAttribute(key, value);
    }
    element.append(...children.filter(Boolean));
    return element;
  };
  const number = (value) => value.toLocaleString("en-US");

  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // ---- names ----

  // The last parts of a name say most: a cell that is too narrow cuts what stands before them.
  const nameParts = (text) => {
    const at = text.lastIndexOf(".", text.lastIndexOf(".") - 1) + 1;
    return [text.slice(0, at), text.slice(at)];
  };
  const name = (text) => {
    const [head, leaf] = nameParts(text.length > CUT ? `${text.slice(0, CUT)}…` : text);
    return make("span", { class: "name", title: text.slice(0, 2000) }, head && make("bdi", { class: "head", text: head }), make("bdi", { class: "leaf", text: leaf }));
  };
  const whole = (text) => {
    const shown = make("bdi", { class: "whole", text: text.length > CUT ? `${text.slice(0, CUT)}…` : text });
    if (text.length <= CUT) return shown;
    const more = make("button", { class: "plain", text: `show all ${number(text.length)} characters`, onclick: () => { shown.textContent = text; more.remove(); } });
    return make("span", {}, shown, more);
  };

  const data = byId("lineage-data");
  if (data) draw(new Lineage(JSON.parse(data.textContent)));

  function draw(lineage) {
    const list = byId("list"), panel = byId("panel"), search = byId("search"), shown = byId("shown");
    const state = { kinds: new Set(), query: "", everything: false, open: new Set(), closed: new Set(), active: 0, rows: [] };
    const drawn = new Map(); // row number -> its element

    const badge = (kind) => {
      const { glyph, word, tone } = lineage.kinds[kind];
      return make("span", { class: `kind ${tone}` }, make("i", { "aria-hidden": "true", text: glyph }), word);
    };

    // ---- which rows ----

    function refresh(keep = false) {
      const matched = lineage.matching(state.kinds, state.query);
      const searching = state.query.trim() !== "" || state.kinds.size > 0;
      state.rows = lineage.rows(matched, { ...state, searching });
      if (!keep) state.active = 0;
      state.active = Math.min(state.active, Math.max(0, state.rows.length - 1));
      const count = matched.reduce((sum, bit) => sum + bit, 0);
      shown.textContent = count === lineage.size ? `${number(count)} tensors` : `${number(count)} of ${number(lineage.size)} tensors`;
      byId("nothing").hidden = state.rows.length > 0;
      list.style.height = `${state.rows.length * ROW}px`;
      list.setAttribute("aria-rowcount", state.rows.length);
      if (!keep) scrollBy(0, Math.min(0, list.getBoundingClientRect().top - headHeight())); // to what was found first
      drawn.forEach((element) => element.remove());
      drawn.clear();
      paint();
    }

    // ---- virtual list: only what the window shows is there ----

    const headHeight = () => byId("head").getBoundingClientRect().height;

    function paint() {
      const top = -list.getBoundingClientRect().top;
      const first = Math.max(0, Math.floor(top / ROW) - SPARE);
      const last = Math.min(state.rows.length, Math.ceil((top + innerHeight) / ROW) + SPARE);
      for (const [at, element] of drawn) if (at < first || at >= last) { element.remove(); drawn.delete(at); }
      // What stays is not touched: a click whose row is replaced between press and release would be lost.
      let next = list.firstChild;
      for (let at = first; at < last; at += 1) {
        if (!drawn.has(at)) drawn.set(at, list.insertBefore(row(at), next));
        next = drawn.get(at).nextSibling;
      }
      list.setAttribute("aria-activedescendant", `row-${state.active}`);
    }

    function activate(at) {
      drawn.get(state.active)?.setAttribute("aria-selected", "false");
      state.active = at;
      drawn.get(at)?.setAttribute("aria-selected", "true");
    }

    function row(at) {
      const item = state.rows[at];
      const cells = { section: sectionCells, group: groupCells, figure: figureCells }[item.type](item);
      const foldable = item.type === "section" || (item.type === "group" && item.foldable && item.line === 0);
      const element = make("div", {
        id: `row-${at}`, role: "row", class: `row ${item.type}${item.line ? "" : " first"}${item.titled ? " within" : ""}`, "aria-rowindex": at + 1,
        "aria-level": item.type === "section" ? 1 : item.type === "group" ? 2 : 3, "aria-expanded": foldable ? String(item.open) : undefined,
        "aria-selected": String(at === state.active),
      }, ...cells);
      element.dataset.at = at;
      element.style.transform = `translateY(${at * ROW}px)`;
      return element;
    }

    const caret = (item) => make("span", { class: "caret", "aria-hidden": "true", text: item.open ? "▾" : "▸" });
    const cell = (side, ...children) => make("div", { role: "gridcell", class: `cell ${side}` }, ...children);

    function sectionCells(item) {
      return [
        cell("left", caret(item), item.left && make("bdi", { class: "module", text: item.left })),
        cell("middle", make("span", { class: "faint", text: number(item.count) })),
        cell("right", item.right && make("bdi", { class: "module", text: item.right })),
      ];
    }

    // A line within a section does not repeat the module that stands above it.
    const within = (text, module) => (module && text.startsWith(`${module}.`) ? text.slice(module.length + 1) : text);

    function groupCells(item) {
      const { group, line } = item;
      const [left, right] = [group.left[line], group.right[line]];
      const [leftModule, rightModule] = lineage.sections[group.section];
      const part = item.count < group.count && line === 0 ? make("span", { class: "count", text: `${number(item.count)} found of` }) : null;
      const side = (each, module) => each && [name(within(each.text, module)), each.count > 1 && make("span", { class: "count", text: `×${number(each.count)}` }), make("span", { class: "spec", text: each.spec })];
      return [
        cell("left", line === 0 && item.foldable ? caret(item) : make("span", { class: "caret" }), ...(side(left, leftModule) || [])),
        wires(line, group.left.length, group.right.map((each) => each.kind), group.kind),
        cell("right", part, ...(side(right, rightModule) || [])),
      ];
    }

    function figureCells(item) {
      const { sources, outputs, line } = item;
      const tensor = (side, at) => [name(lineage[side].names[at]), make("span", { class: "spec", text: lineage.spec(side, at)[0] })];
      const kinds = outputs.map((link) => lineage.links.kind[link]);
      return [
        cell("left", make("span", { class: "caret" }), ...(line < sources.length ? tensor("left", sources[line]) : [])),
        wires(line, sources.length, kinds, lineage.links.kind[item.links[0]]),
        cell("right", ...(line < outputs.length ? tensor("right", lineage.links.output[outputs[line]]) : [])),
      ];
    }

    // The lines between both sides: brackets where one becomes several, or several one.
    function wires(line, lefts, kinds, only) {
      const rights = kinds.length, half = ROW / 2 - 0.5; // on the middle of a pixel, so that lines are sharp
      const kind = kinds[line] ?? only;
      const bracket = (count, inward) => {
        const upright = count < 2 ? "" : line === 0 ? `M8 ${half}V${ROW}` : line < count - 1 ? `M8 0V${ROW}` : `M8 0V${half}`;
        return upright + (line < count ? (inward || line === 0 ? `M0 ${half}H8` : "") + (!inward || line === 0 ? `M8 ${half}H20` : "") : "");
      };
      const svg = (path, arrow) => {
        const element = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        for (const [key, value] of [["viewBox", `0 0 20 ${ROW}`], ["width", 20], ["height", ROW], ["aria-hidden", "true"]]) element.setAttribute(key, value);
        const stroke = document.createElementNS("http://www.w3.org/2000/svg", "path");
        stroke.setAttribute("d", path + (arrow ? `M15 ${half - 4}L20 ${half}L15 ${half + 4}` : ""));
        element.append(stroke);
        return element;
      };
      const said = line === 0 || (line < rights && kinds[line] !== kinds[line - 1]);
      const wire = (there) => make("span", { class: there ? "wire" : "gap" });
      const element = cell(`middle ${lineage.kinds[kind].tone}`,
        line < lefts ? svg(bracket(lefts, true), false) : make("span", { class: "stub" }),
        wire(line === 0 && lefts > 0), said ? badge(kind) : null, wire(line === 0 && rights > 0),
        line < rights ? svg(bracket(rights, false), true) : make("span", { class: "stub" }));
      return element;
    }

    // ---- lineage of one tensor ----

    const tensorButton = (side, at, link) => make("li", {},
      make("button", { class: "tensor", onclick: () => (link === undefined ? showSource(at) : (reveal(link), showLink(link))) }, whole(lineage[side].names[at])),
      make("span", { class: "spec", text: lineage.spec(side, at).join(", ") }));

    const linkButton = (link) => {
      const output = lineage.links.output[link];
      const item = output < 0
        ? tensorButton("left", lineage.links.sources[link][0])
        : tensorButton("right", output, link);
      item.append(badge(lineage.links.kind[link]));
      return item;
    };

    const few = (items, each) => {
      const shownFirst = items.slice(0, FEW).map(each);
      if (items.length > FEW) shownFirst.push(make("li", { class: "faint", text: `and ${number(items.length - FEW)} more` }));
      return make("ul", {}, ...shownFirst);
    };
    const part = (title, ...children) => make("section", {}, make("h3", { text: title }), ...children);

    function open(title, side, at, ...parts) {
      panel.replaceChildren(
        make("header", {}, make("h2", { text: title }), make("button", { id: "close", text: "Close", onclick: close })),
        make("p", { class: "subject" }, whole(lineage[side].names[at])),
        make("p", { class: "spec", text: lineage.spec(side, at).join(", ") }),
        ...parts.filter(Boolean));
      panel.hidden = false;
      root.classList.add("with-panel");
      panel.scrollTop = 0;
      paint();
    }

    function close() {
      panel.hidden = true;
      root.classList.remove("with-panel");
      list.focus({ preventScroll: true });
      paint();
    }

    function showLink(link) {
      const { links, texts, origins } = lineage, output = links.output[link];
      if (output < 0) return showSource(links.sources[link][0]);
      const kind = links.kind[link], verb = links.verb[link], how = texts[links.how[link]], note = texts[links.note[link]];
      const group = lineage.groups[lineage.place[link][0]], others = lineage.neighbours(link);
      return open("Lineage", "right", output,
        make("p", {}, badge(kind), ` ${lineage.kinds[kind].sentence}`),
        verb >= 0 && make("p", {}, badge(verb), ` ${lineage.kinds[verb].sentence}`),
        note && make("p", { class: "note" }, make("bdi", { text: note })),
        group.figures.length > 1 && make("p", { class: "faint", text: `One of ${number(group.figures.length)} that are made in the same way.` }),
        how && part("How", make("code", { class: "how" }, make("bdi", { text: how }))),
        links.sources[link].length > 0 && part(how ? "Made of, in this order" : "Made of", make(how ? "ol" : "ul", {}, ...links.sources[link].map((source) => tensorButton("left", source)))),
        madeBy(origins[links.origin[link]]),
        others.length > 0 && part("Also made of these", few(others, linkButton)));
    }

    function showSource(source) {
      const users = lineage.users[source], alone = users.find((link) => lineage.links.output[link] < 0);
      const kind = alone === undefined ? undefined : lineage.links.kind[alone];
      const notes = alone === undefined ? [] : [lineage.texts[lineage.links.note[alone]], lineage.texts[lineage.links.how[alone]]].filter(Boolean);
      const made = users.filter((link) => link !== alone);
      open("Where it goes", "left", source,
        kind !== undefined && make("p", {}, badge(kind), ` ${lineage.kinds[kind].sentence}`),
        ...notes.map((note) => make("p", { class: "note" }, make("bdi", { text: note }))),
        alone !== undefined && madeBy(lineage.origins[lineage.links.origin[alone]]),
        made.length > 0 && part("Becomes", few(made, linkButton)));
    }

    function madeBy([place, first, excerpt]) {
      if (!place) return null;
      const lines = excerpt ? excerpt.split("\n") : [];
      return part("By", make("p", { class: "place" }, make("bdi", { text: place })), lines.length > 0 && make("pre", {},
        ...lines.map((text, at) => make("span", { class: "line" }, make("span", { class: "at", text: first + at }), make("bdi", { text }), "\n"))));
    }

    // ---- keys and clicks ----

    function act(item, side) {
      if (item.type === "section") return fold(item);
      if (item.type === "figure") {
        const link = item.outputs[item.line] ?? item.links[0];
        return side === "left" && item.line < item.sources.length ? showSource(item.sources[item.line]) : showLink(link);
      }
      const links = item.group.figures[0], outputs = links.filter((link) => lineage.links.output[link] >= 0);
      const sources = [...new Set(links.flatMap((link) => lineage.links.sources[link]))];
      const like = lineOf(item.group.right, outputs.map((link) => lineage.right.names[lineage.links.output[link]]), item.line);
      if (side === "left" && item.line < item.group.left.length) return showSource(sources[Math.min(item.line, sources.length - 1)]);
      return showLink(outputs[like] ?? links[0]);
    }
    // Which of a figure's names a template stands for: names and templates without their numbers are the same.
    const bare = (text) => text.replace(/\{[\d,-]+\}|\d+/g, "#");
    const lineOf = (lines, names, line) => Math.max(0, names.findIndex((text) => lines[line] && bare(text) === bare(lines[line].text)));

    function fold(item, want) {
      if (item.type === "figure" || (item.type === "group" && !item.foldable)) return;
      if (want !== undefined && want === item.open) return;
      const [set, key] = item.type === "section" ? [state.closed, item.section] : [state.open, item.g];
      if (!set.delete(key)) set.add(key);
      refresh(true);
    }

    function reveal(link) {
      const [g, f] = lineage.place[link], group = lineage.groups[g];
      state.closed.delete(group.section);
      if (group.figures.length > 1 && state.everything === state.open.has(g)) {
        if (!state.open.delete(g)) state.open.add(g);
      }
      refresh(true);
      const at = state.rows.findIndex((item) => item.g === g && (item.type === "figure" ? item.f === f && (item.outputs[item.line] ?? item.links[0]) === link : group.figures.length === 1));
      if (at >= 0) move(at);
    }

    function move(at) {
      activate(Math.max(0, Math.min(state.rows.length - 1, at)));
      const top = list.getBoundingClientRect().top + state.active * ROW;
      if (top < headHeight()) scrollBy(0, top - headHeight());
      else if (top + ROW > innerHeight) scrollBy(0, top + ROW - innerHeight);
      paint();
    }

    list.addEventListener("click", (event) => {
      const element = event.target.closest(".row");
      if (!element) return;
      activate(Number(element.dataset.at));
      const item = state.rows[state.active];
      if (event.target.closest(".caret") && item.type === "group" && item.foldable) fold(item);
      else act(item, event.target.closest(".cell.left") ? "left" : "right");
    });
    list.addEventListener("keydown", (event) => {
      const item = state.rows[state.active], page = Math.floor((innerHeight - headHeight()) / ROW) - 1;
      if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
      const keys = {
        ArrowDown: () => move(state.active + 1), ArrowUp: () => move(state.active - 1), PageDown: () => move(state.active + page), PageUp: () => move(state.active - page),
        Home: () => move(0), End: () => move(state.rows.length - 1), ArrowRight: () => fold(item, true), ArrowLeft: () => fold(item, false),
        Enter: () => act(item, "right"), " ": () => act(item, "right"),
      };
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !panel.hidden) close();
      else if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) {
        event.preventDefault();
        search.focus();
      }
    });
    search.addEventListener("input", () => { state.query = search.value; refresh(); });
    search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "Enter") list.focus({ preventScroll: true });
    });
    byId("every").addEventListener("click", (event) => {
      state.everything = !state.everything;
      state.open.clear();
      state.closed.clear();
      event.currentTarget.setAttribute("aria-pressed", state.everything);
      refresh();
    });
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; paint(); });
    };
    addEventListener("scroll", later, { passive: true });
    addEventListener("resize", later);

    // ---- how many of which kind: a bar, and buttons that filter ----

    const counts = new Map();
    for (const kind of lineage.links.kind) counts.set(kind, (counts.get(kind) ?? 0) + 1);
    const kinds = [...counts.keys()].sort((a, b) => a - b);
    byId("bar").append(...kinds.map((kind) => {
      const piece = make("span", { class: lineage.kinds[kind].tone });
      piece.style.flexGrow = counts.get(kind);
      return piece;
    }));
    byId("kinds").append(...kinds.map((kind) => {
      const chip = make("button", {
        class: "chip", "aria-pressed": "false", title: lineage.kinds[kind].sentence,
        onclick: () => {
          if (!state.kinds.delete(kind)) state.kinds.add(kind);
          chip.setAttribute("aria-pressed", state.kinds.has(kind));
          refresh();
        },
      }, badge(kind), make("span", { class: "count", text: number(counts.get(kind)) }));
      return chip;
    }));
    refresh(true);
    globalThis.requestIdleCallback?.(() => lineage.texts_of_links); // so that the first key is as quick as the next
  }
}
