"use strict";
// The lineage that the page carries, and which rows of it are shown: no document, no drawing.

class Lineage {
  constructor(data) {
    Object.assign(this, data); // kinds, specs, left, right, links, texts, origins, sections
    for (const side of [this.left, this.right]) {
      let last = "";
      side.names = side.rests.map((rest, at) => (last = last.slice(0, side.shared[at]) + rest)); // a name is told by what the one before it lacks
    }
    this.groups = this.sections.flatMap(([, , groups], section) =>
      groups.map(([left, right, kind, figures]) => ({ section, left, right, kind, figures, count: figures.flat().length })));
    this.place = []; // link -> its group and figure
    this.groups.forEach((group, g) => group.figures.forEach((figure, f) => figure.forEach((link) => { this.place[link] = [g, f]; })));
    this.users = this.left.names.map(() => []); // source -> links that are made of it
    this.links.sources.forEach((sources, link) => sources.forEach((source) => this.users[source].push(link)));
    this.size = this.links.kind.length;
  }

  spec(side, at) { return this.specs[this[side].specs[at]]; }

  // What a search looks into, one text per link; made when it is first asked for.
  get texts_of_links() {
    this.searched ??= this.links.sources.map((sources, link) => {
      const output = this.links.output[link];
      const left = sources.map((source) => `${this.left.names[source]} ${this.spec("left", source)[0]}`);
      const right = output < 0 ? "" : `${this.right.names[output]} ${this.spec("right", output)[0]}`;
      return `${left.join(" ")} ${right} ${this.kinds[this.links.kind[link]].word}`.toLowerCase();
    });
    return this.searched;
  }

  // One byte per link: is it of these kinds (none: all), and does it hold every word?
  matching(kinds, query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const found = new Uint8Array(this.size);
    const texts = words.length ? this.texts_of_links : [];
    for (let link = 0; link < this.size; link += 1) {
      found[link] = (!kinds.size || kinds.has(this.links.kind[link])) && words.every((word) => texts[link].includes(word)) ? 1 : 0;
    }
    return found;
  }

  // The rows to show: {type: "section"} or {type: "group" | "figure", line: k of `of`}. A group of which a search found only a part is open.
  rows(matched, { open, closed, everything, searching }) {
    const rows = [];
    let group_at = 0;
    this.sections.forEach(([left, right, groups], section) => {
      const shown = [];
      groups.forEach(() => {
        const g = group_at, group = this.groups[group_at];
        group_at += 1;
        let count = 0;
        for (const figure of group.figures) for (const link of figure) count += matched[link];
        if (count) shown.push({ g, group, count });
      });
      if (!shown.length) return;
      const titled = left || right;
      if (titled) rows.push({ type: "section", section, left, right, open: !closed.has(section), count: shown.reduce((sum, each) => sum + each.count, 0) });
      if (titled && closed.has(section)) return;
      for (const { g, group, count } of shown) {
        const foldable = group.figures.length > 1;
        const unfolded = foldable && (everything !== open.has(g) || (searching && count < group.count));
        const lines = Math.max(group.left.length, group.right.length);
        for (let line = 0; line < lines; line += 1) rows.push({ type: "group", g, group, line, foldable, open: unfolded, count, titled });
        if (!unfolded) continue;
        group.figures.forEach((links, f) => {
          if (!links.some((link) => matched[link])) return;
          const sources = [...new Set(links.flatMap((link) => this.links.sources[link]))];
          const outputs = links.filter((link) => this.links.output[link] >= 0);
          const height = Math.max(sources.length, outputs.length);
          for (let line = 0; line < height; line += 1) rows.push({ type: "figure", g, group, f, links, sources, outputs, line, titled });
        });
      }
    });
    return rows;
  }

  // Links that share a source with this one.
  neighbours(link) {
    return [...new Set(this.links.sources[link].flatMap((source) => this.users[source]))].filter((other) => other !== link);
  }
}
