"use strict";
(() => {
  // What does not print, or turns text around, is shown as an escape.
  const shown = (text) => text.replace(/(?!\n)[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu,
    (letter) => `\\u{${letter.codePointAt(0).toString(16)}}`);
  const { page, states, version } = JSON.parse(document.getElementById("data").textContent,
    (_, value) => typeof value === "string" ? shown(value) : value);
  const $ = (id) => document.getElementById(id);
  const STEP = 500;      // how many lines of a tree are drawn at once
  const OPEN = 60;       // how many lines are open at first
  const KEYS = 100;      // how many keys are listed at once
  const LINES = 600;     // how many flows are drawn at most

  // Text comes from files of unknown origin: it is only ever set as text.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // Names

  const segment = (part) => typeof part === "string" ? part
    : `{${part.map(([a, b]) => a === b ? `${a}` : b === a + 1 ? `${a},${b}` : `${a}..${b}`).join(",")}}`;
  const many = (count) => `${count} ${page.unit}${count === 1 ? "" : "s"}`;
  const text = (row) => row.path.map(segment).join(".");

  function* keys(row) {
    const numbers = (part) => typeof part === "string" ? [part]
      : part.flatMap(([a, b]) => Array.from({ length: b - a + 1 }, (_, i) => a + i));
    const columns = row.path.map(numbers);
    const at = columns.map(() => 0);
    for (;;) {
      yield columns.map((column, i) => column[at[i]]).join(".");
      let i = at.length - 1;
      while (i >= 0 && ++at[i] === columns[i].length) at[i--] = 0;
      if (i < 0) return;
    }
  }

  // A part of a name, as it is written in patterns or in keys.
  function matches(row, query) {
    if (text(row).includes(query)) return true;
    const wanted = query.split(".");
    const fits = (part, word, first, last) => {
      if (typeof part !== "string") {
        return /^\d+$/.test(word) ? part.some(([a, b]) => a <= +word && +word <= b)
          : word === "" && (first || last);
      }
      if (first && last) return part.includes(word);
      return first ? part.endsWith(word) : last ? part.startsWith(word) : part === word;
    };
    for (let start = 0; start + wanted.length <= row.path.length; start++) {
      const end = wanted.length - 1;
      if (wanted.every((word, i) => fits(row.path[start + i], word, i === 0, i === end))) return true;
    }
    return false;
  }

  // Trees

  class Tree {
    constructor(name, side) {
      this.name = name;
      this.list = $(`${name}-tree`);
      this.rows = side ? side.rows : [];
      this.flows = this.rows.map(() => []);
      this.leaves = [];
      this.root = { children: new Map(), rows: [], open: true };
      this.limit = STEP;
      this.drawn = new Map();
      this.focus = null;
      $(name).hidden = !side;
      if (!side) return;
      $(`${name}-title`).textContent = side.title;
      this.rows.forEach((row, i) => this.add(row, i));
      this.root = this.join(this.root);
      this.openSome();
      this.list.addEventListener("keydown", (event) => this.press(event));
    }

    add(row, number) {
      let node = this.root;
      const path = row.group ? [`${row.group}/`, ...row.path] : row.path;
      for (const part of path) {
        const key = segment(part);
        if (!node.children.has(key)) node.children.set(key, { name: key, children: new Map(), rows: [], open: false });
        node = node.children.get(key);
      }
      node.rows.push(number);
    }

    // A chain of nodes with one child each becomes one node.
    join(node, parent = null, depth = 0) {
      while (parent && node.children.size === 1 && !node.rows.length) {
        const [child] = node.children.values();
        node = { ...child, name: node.name.endsWith("/") ? `${node.name} ${child.name}` : `${node.name}.${child.name}` };
      }
      node.parent = parent;
      node.depth = depth;
      node.children = [...node.children.values()].map((child) => this.join(child, node, depth + 1));
      for (const row of node.rows) this.leaves[row] = node;
      node.all = [...node.rows, ...node.children.flatMap((child) => child.all)];
      return node;
    }

    openSome() {
      let wave = [...this.root.children];
      let lines = wave.length;
      while (wave.length) {
        const next = [];
        for (const node of wave) {
          if (!node.children.length || lines + node.children.length > OPEN) continue;
          node.open = true;
          lines += node.children.length;
          next.push(...node.children);
        }
        wave = next;
      }
    }

    setAll(open) {
      const visit = (node) => { node.open = open; node.children.forEach(visit); };
      this.root.children.forEach(visit);
      this.limit = STEP;
    }

    // The nodes that show something, with how many tensors of each are shown.
    lines(passes, open) {
      const lines = [];
      const shown = (node) => node.all.filter((i) => passes.has(i));
      const visit = (nodes) => {
        const kept = nodes.map((node) => [node, shown(node)]).filter(([, rows]) => rows.length);
        kept.forEach(([node, rows], i) => {
          lines.push({ node, rows, place: i + 1, of: kept.length });
          if (node.open || open) visit(node.children);
        });
      };
      visit(this.root.children);
      return lines;
    }

    draw(passes, searching) {
      const lines = this.lines(passes, searching && passes.size <= OPEN);
      const nodes = new Set(lines.map((line) => line.node));
      if (!nodes.has(this.focus)) this.focus = lines.length ? lines[0].node : null;
      this.drawn = new Map();
      const items = lines.slice(0, this.limit).map((line) => this.item(line, searching));
      if (lines.length > this.limit) {
        const left = lines.length - this.limit;
        items.push(make("li", { role: "none" }, make("button", {
          type: "button", class: "more", onclick: () => { this.limit += STEP; refresh(); },
        }, `${left} more lines`)));
      }
      if (!lines.length) items.push(make("li", { class: "none", role: "none" }, "Nothing here."));
      this.list.replaceChildren(...items);
      this.shown = lines.map((line) => line.node).slice(0, this.limit);
    }

    item({ node, rows, place, of }) {
      const count = rows.reduce((sum, i) => sum + this.rows[i].count, 0);
      const found = [...new Set(rows.map((i) => this.rows[i].state))];
      const item = make("li", {
        role: "treeitem", "aria-level": node.depth, "aria-posinset": place, "aria-setsize": of,
        "aria-selected": chosen && chosen.tree === this && chosen.node === node,
        tabindex: node === this.focus ? 0 : -1, style: `--depth: ${node.depth - 1}`,
        onclick: (event) => {
          this.focus = node;
          if (node.children.length && (event.target.className === "twist" || !node.rows.length)) {
            node.open = !node.open;
          }
          choose(this, node);
        },
        onfocus: () => mark(this, node),
      },
      make("span", { class: "twist", "aria-hidden": "true" }),
      make("span", { class: "path" }, ...marked(node.name)),
      make("span", { class: "count" }, many(count)));
      if (node.children.length) {
        item.setAttribute("aria-expanded", String(this.isOpen(node)));
      }
      for (const state of found.slice(0, 4)) {
        item.append(make("span", { class: `state ${states[state].tone}` }, states[state].label));
      }
      if (node.rows.length === 1) {
        const { rank, scale, shape, rung, error } = this.rows[node.rows[0]].facts;
        const brief = [];
        if (rank !== undefined) brief.push(`rank ${rank}`);
        if (scale !== undefined) brief.push(`scale ${+(+scale).toPrecision(4)}`);
        if (rung !== undefined) brief.push(error === undefined || rung === "exact" ? rung : `${rung}, error: ${error}`);
        if (rank === undefined && shape !== undefined) brief.push(shape);
        if (brief.length) item.append(make("span", { class: "brief" }, brief.join(" · ")));
      }
      this.drawn.set(node, item);
      return item;
    }

    isOpen(node) {
      return node.open || (query() !== "" && passing[this.name].size <= OPEN);
    }

    // The line that stands for a row: its own, or that of the nearest node that is drawn.
    lineOf(number) {
      let node = this.leaves[number];
      while (node && !this.drawn.has(node)) node = node.parent;
      return node;
    }

    reveal(number) {
      for (let node = this.leaves[number].parent; node; node = node.parent) node.open = true;
      return this.leaves[number];
    }

    moveTo(node) {
      if (!node) return;
      this.focus = node;
      refresh();
      const item = this.drawn.get(node);
      if (item) { item.focus(); item.scrollIntoView({ block: "nearest" }); }
    }

    press(event) {
      if (event.altKey || event.ctrlKey || event.metaKey || event.target.tagName === "BUTTON") return;
      const node = this.focus;
      if (!node) return;
      const at = this.shown.indexOf(node);
      const open = node.children.length && this.isOpen(node);
      const act = {
        ArrowDown: () => this.moveTo(this.shown[at + 1]),
        ArrowUp: () => this.moveTo(this.shown[at - 1]),
        Home: () => this.moveTo(this.shown[0]),
        End: () => this.moveTo(this.shown[this.shown.length - 1]),
        ArrowRight: () => {
          if (open) return this.moveTo(this.shown[at + 1]);
          if (node.children.length) { node.open = true; this.moveTo(node); }
        },
        ArrowLeft: () => {
          if (node.open && node.children.length) { node.open = false; this.moveTo(node); }
          else if (node.parent && node.parent.parent) this.moveTo(node.parent);
        },
        "*": () => { (node.parent || this.root).children.forEach((one) => { one.open = true; }); this.moveTo(node); },
        Enter: () => choose(this, node),
        " ": () => choose(this, node),
        f: () => follow(this, node),
      }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    }
  }

  const trees = { left: new Tree("left", page.left), right: new Tree("right", page.right) };
  const other = (tree) => tree === trees.left ? trees.right : trees.left;
  page.flows.forEach((flow, i) => {
    flow.sources.forEach((row) => trees.left.flows[row].push(i));
    flow.targets.forEach((row) => trees.right.flows[row].push(i));
  });

  const flowsOf = (tree, rows) => new Set(rows.flatMap((row) => tree.flows[row]));
  const endsOf = (tree, flow) => tree === trees.left ? flow.sources : flow.targets;

  // Filters

  const wanted = new Set();
  let passing = { left: new Set(), right: new Set() };
  let chosen = null;
  const query = () => $("search").value.trim();

  // A name with the part that was searched for marked.
  function marked(name) {
    const words = query();
    const at = words ? name.toLowerCase().indexOf(words.toLowerCase()) : -1;
    if (at < 0) return [name];
    return [name.slice(0, at), make("mark", {}, name.slice(at, at + words.length)), name.slice(at + words.length)];
  }

  // Rows that fit the filters, and what they come from or become.
  function filter() {
    const words = query();
    const fits = (row) => (!wanted.size || wanted.has(row.state)) && (!words || matches(row, words));
    const found = {};
    for (const [name, tree] of Object.entries(trees)) {
      found[name] = new Set(tree.rows.flatMap((row, i) => fits(row) ? [i] : []));
    }
    const with_partners = { left: new Set(found.left), right: new Set(found.right) };
    for (const flow of page.flows) {
      if (flow.sources.some((i) => found.left.has(i))) flow.targets.forEach((i) => with_partners.right.add(i));
      if (flow.targets.some((i) => found.right.has(i))) flow.sources.forEach((i) => with_partners.left.add(i));
    }
    return with_partners;
  }

  function refresh() {
    passing = filter();
    for (const [name, tree] of Object.entries(trees)) if (tree.rows.length) tree.draw(passing[name], query() !== "");
    const sum = (name) => [...passing[name]].reduce((n, i) => n + trees[name].rows[i].count, 0);
    $("shown").textContent = page.right ? `${many(sum("left"))} on the left, ${sum("right")} on the right`
      : many(sum("left"));
    drawFlows();
  }

  function drawFlows() {
    const svg = $("flows");
    const stage = $("stage").getBoundingClientRect();
    const box = (item) => item.getBoundingClientRect();
    const lines = new Map();
    for (const flow of page.flows) {
      const ends = (tree, rows) => new Set(rows.filter((i) => passing[tree.name].has(i)).map((i) => tree.lineOf(i)));
      for (const from of ends(trees.left, flow.sources)) {
        for (const to of ends(trees.right, flow.targets)) {
          if (!from || !to) continue;
          if (!lines.has(from)) lines.set(from, new Map());
          const old = lines.get(from).get(to);
          if (!old || old === "kept") lines.get(from).set(to, flow.state);
        }
      }
    }
    const paths = [];
    for (const [from, targets] of lines) {
      for (const [to, state] of targets) {
        if (paths.length === LINES) break;
        const a = box(trees.left.drawn.get(from));
        const b = box(trees.right.drawn.get(to));
        if (!a.width || !b.width) continue;
        const [x, y] = [a.right - stage.left, a.top + a.height / 2 - stage.top];
        const [u, v] = [b.left - stage.left, b.top + b.height / 2 - stage.top];
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
        path.setAttribute("d", `M${x} ${y}C${(x + u) / 2} ${y} ${(x + u) / 2} ${v} ${u} ${v}`);
        path.setAttribute("class", states[state].tone);
        path.ends = [from, to];
        paths.push(path);
      }
    }
    svg.replaceChildren(...paths);
    const active = document.activeElement && document.activeElement.closest && document.activeElement.closest("[role=tree]");
    const tree = active ? trees[active.id.replace("-tree", "")] : chosen && chosen.tree;
    if (tree && tree.focus) mark(tree, tree.focus);
  }

  // Marks what a line is connected with.
  function mark(tree, node) {
    const partners = new Set();
    for (const i of flowsOf(tree, node.all.filter((row) => passing[tree.name].has(row)))) {
      for (const row of endsOf(other(tree), page.flows[i])) partners.add(other(tree).lineOf(row));
    }
    for (const [one, item] of other(tree).drawn) item.classList.toggle("partner", partners.has(one));
    for (const [, item] of tree.drawn) item.classList.remove("partner");
    const mine = tree === trees.left ? 0 : 1;
    let any = false;
    for (const path of $("flows").children) {
      const on = path.ends[mine] === node;
      any = any || on;
      path.classList.toggle("on", on);
    }
    $("flows").classList.toggle("choice", any);
  }

  function follow(tree, node) {
    for (const i of flowsOf(tree, node.all.filter((row) => passing[tree.name].has(row)))) {
      const [row] = endsOf(other(tree), page.flows[i]);
      if (row !== undefined) return goTo(other(tree), row);
    }
  }

  function goTo(tree, row) {
    showSide(tree.name);
    if (!passing[tree.name].has(row)) { wanted.clear(); $("search").value = ""; drawFilters(); }
    const node = tree.reveal(row);
    choose(tree, node);
    tree.moveTo(node);
  }

  // Details

  function choose(tree, node) {
    chosen = { tree, node };
    refresh();
    const detail = $("detail");
    const close = make("button", { type: "button", onclick: closeDetail }, "Close");
    detail.replaceChildren(make("div", { class: "head" }, make("h2", {}, fullName(node)), close));
    const rows = node.all.filter((i) => passing[tree.name].has(i));
    for (const i of node.rows.filter((row) => passing[tree.name].has(row))) detail.append(...describe(tree, i));
    if (!node.rows.length) {
      const kinds = new Map();
      for (const i of rows) kinds.set(tree.rows[i].state, (kinds.get(tree.rows[i].state) || 0) + tree.rows[i].count);
      for (const [state, count] of kinds) {
        detail.append(make("p", {}, make("b", { class: states[state].tone }, states[state].label), ` ${count}: ${states[state].means}`));
      }
    }
    const flows = [...flowsOf(tree, rows)];
    for (const i of flows.slice(0, 20)) detail.append(...describeFlow(tree, page.flows[i]));
    if (flows.length > 20) detail.append(make("p", { class: "code" }, `… and ${flows.length - 20} more rules; open it to see them`));
    detail.hidden = false;
    const item = tree.drawn.get(node);
    if (!item) return;
    item.focus({ preventScroll: true });
    const covered = item.getBoundingClientRect().bottom - detail.getBoundingClientRect().top + 8;
    if (covered > 0) scrollBy(0, covered);
  }

  function fullName(node) {
    if (!node.parent.parent) return node.name;
    const above = fullName(node.parent);
    return `${above}${above.endsWith("/") ? " " : "."}${node.name}`;
  }

  function describe(tree, i) {
    const row = tree.rows[i];
    const state = states[row.state];
    const fact = (name, ...value) => make("div", {}, make("dt", {}, name), make("dd", {}, ...value));
    const list = make("dl", {}, fact("state", make("b", { class: state.tone }, state.label), `: ${state.means}`));
    for (const [name, value] of Object.entries(row.facts)) list.append(fact(name, String(value)));
    const all = make("details", {}, make("summary", {}, row.count === 1 ? "its key" : `${row.count} keys`));
    all.addEventListener("toggle", () => {
      if (!all.open || all.lastChild.tagName !== "SUMMARY") return;
      const source = keys(row);
      const items = make("ol");
      const more = make("button", { type: "button", onclick: () => fill() }, "More");
      let left = row.count;
      const fill = () => {
        for (let n = 0; n < KEYS && left; n++, left--) {
          const next = source.next();
          if (next.done) left = 1;  // a pattern that was cut short stands for more keys than it tells
          else items.append(make("li", {}, make("code", {}, next.value)));
        }
        more.hidden = !left;
        more.textContent = `${left} more`;
      };
      all.append(items, more);
      fill();
    });
    return page.unit === "tensor" ? [list, all] : [list];
  }

  function describeFlow(tree, flow) {
    const there = other(tree);
    const title = `${tree === trees.left ? "becomes" : "comes from"} (${states[flow.state].label}${flow.times > 1 ? `, ${flow.times} times` : ""})`;
    const links = make("div", { class: "links" });
    for (const row of endsOf(there, flow).slice(0, 40)) {
      links.append(make("button", { type: "button", onclick: () => goTo(there, row) }, `${text(there.rows[row])}`));
    }
    if (!links.children.length) links.append("nothing");
    const parts = [make("h3", {}, title), links, make("p", { class: "code" }, flow.rule)];
    if (flow.note) parts.push(make("pre", {}, flow.note));
    return parts;
  }

  function closeDetail() {
    $("detail").hidden = true;
    const was = chosen;
    chosen = null;
    refresh();
    if (was && was.tree.drawn.has(was.node)) was.tree.drawn.get(was.node).focus({ preventScroll: true });
  }

  // The page around the trees

  function drawFilters() {
    const counts = {};
    for (const tree of [trees.left, trees.right]) {
      const mine = {};
      for (const row of tree.rows) mine[row.state] = (mine[row.state] || 0) + row.count;
      for (const [state, count] of Object.entries(mine)) counts[state] = Math.max(counts[state] || 0, count);
    }
    const always = page.unit !== "tensor" ? [] : page.right ? ["renamed", "fused", "dropped", "refused", "unmatched"] : ["refused", "unmatched"];
    const names = Object.keys(states).filter((state) => counts[state] || always.includes(state));
    $("filters").replaceChildren(...names.map((state) => {
      const button = make("button", {
        type: "button", "data-state": state, "aria-pressed": wanted.has(state), title: states[state].means,
        onclick: () => {
          if (!wanted.delete(state)) wanted.add(state);
          for (const tree of Object.values(trees)) tree.limit = STEP;
          button.setAttribute("aria-pressed", wanted.has(state));
          refresh();
        },
      }, `${states[state].label} ${counts[state] || 0}`);
      button.disabled = !counts[state];
      return button;
    }));
  }

  function showSide(name) {
    $("stage").dataset.side = name;
    for (const button of $("sides").children) button.setAttribute("aria-pressed", button.dataset.side === name);
    drawFlows();
  }

  // What is said of many keys is said once, as on the terminal.
  function grouped(findings) {
    const found = new Map();
    for (const finding of findings) {
      const alike = JSON.stringify([finding.code, finding.message, finding.where, finding.rule, finding.fix]);
      if (!found.has(alike)) found.set(alike, { finding, keys: [] });
      if (finding.key) found.get(alike).keys.push(finding.key);
    }
    return [...found.values()];
  }

  function drawFindings() {
    const first = 50, shown = 3;
    const kinds = grouped(page.findings);
    const list = $("findings").querySelector("ol");
    $("findings").hidden = !page.findings.length;
    const several = kinds.length < page.findings.length ? ` of ${kinds.length} kind${kinds.length === 1 ? "" : "s"}` : "";
    $("findings-title").textContent = `${page.findings.length} problem${page.findings.length === 1 ? "" : "s"}${several}`;
    const item = ({ finding, keys }) => {
      const parts = keys.slice(0, shown).map((key) => make("p", {}, make("code", { class: "bad" }, key)));
      if (keys.length > shown) {
        const rest = make("details", {}, make("summary", {}, `and ${keys.length - shown} more keys`));
        rest.append(make("pre", {}, keys.slice(shown).join("\n")));
        parts.push(rest);
      }
      parts.push(make("p", {}, finding.message, " ", make("span", { class: "code" }, finding.code)));
      if (finding.where) parts.push(make("p", { class: "code" }, finding.where));
      if (finding.rule) parts.push(make("p", { class: "code" }, `rule: ${finding.rule}`));
      if (finding.fix) {
        parts.push(make("p", {}, make("b", { class: "good" }, "Fix: "), finding.fix));
        for (const [, command] of finding.fix.matchAll(/`(regraft [^`]+)`/g)) parts.push(copyable(command));
      }
      return make("li", {}, ...parts);
    };
    list.replaceChildren(...kinds.slice(0, first).map(item));
    if (kinds.length > first) {
      const more = make("button", {
        type: "button", onclick: () => { list.append(...kinds.slice(first).map(item)); more.remove(); },
      }, `Show all ${kinds.length}`);
      $("findings").append(more);
    }
  }

  // A command with a button that copies it.
  function copyable(command) {
    const button = make("button", { type: "button", class: "copy", title: "Copy" }, "Copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    const code = make("pre", {}, command);
    return make("div", { class: "command" }, code, button);
  }

  function drawHead() {
    $("command").textContent = page.command;
    $("title").textContent = page.title;
    $("verdict").replaceChildren(make("b", { class: page.verdict.tone }, page.verdict.name), `: ${page.verdict.value}`);
    $("layouts").textContent = [page.left, page.right].filter((side) => side && side.title.includes(": "))
      .map((side) => side.title.replace(/^[^:]*: /, "")).join(" → ");
    const listed = (facts) => facts.flatMap((fact) => [
      make("dt", {}, fact.name), make("dd", { class: fact.tone === "plain" ? "" : fact.tone }, fact.value),
    ]);
    $("sources").hidden = !page.sources.length;
    $("sources-title").textContent = `${page.sources.length} source${page.sources.length === 1 ? "" : "s"}`;
    $("sources").querySelector("dl").replaceChildren(...listed(page.sources));
    $("facts").querySelector("dl").replaceChildren(...listed(page.facts));
    $("facts").hidden = !page.facts.length;
    $("notes").hidden = !page.notes.length;
    $("notes").querySelector("ul").replaceChildren(...page.notes.map((note) => make("li", {}, note)));
    $("next").hidden = !page.next.length;
    $("next").replaceChildren(...page.next.map((fact) => make("div", {}, make("span", { class: "code" }, fact.name), copyable(fact.value))));
    $("made").textContent = `Made by regraft ${version}. This page needs no network and loads nothing.`;
  }

  function drawTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const now = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
    const label = () => { $("theme").textContent = now() === "dark" ? "Light" : "Dark"; };
    $("theme").addEventListener("click", () => {
      document.documentElement.dataset.theme = now() === "dark" ? "light" : "dark";
      label();
    });
    dark.addEventListener("change", label);
    label();
  }

  drawHead();
  drawTheme();
  drawFindings();
  $("tensors-title").textContent = `${page.unit[0].toUpperCase()}${page.unit.slice(1)}s`;
  $("tensors").hidden = !trees.left.rows.length && !trees.right.rows.length;
  $("stage").classList.toggle("single", !page.right);
  $("sides").hidden = !page.right;
  if (page.left && page.right) {
    $("sides").replaceChildren(...["left", "right"].map((name) => make("button", {
      type: "button", "data-side": name, onclick: () => showSide(name),
    }, page[name].title)));
  }
  drawFilters();
  refresh();
  showSide("left");
  $("search").addEventListener("input", () => { for (const tree of Object.values(trees)) tree.limit = STEP; refresh(); });
  $("expand").addEventListener("click", () => { for (const tree of Object.values(trees)) tree.setAll(true); refresh(); });
  $("collapse").addEventListener("click", () => { for (const tree of Object.values(trees)) tree.setAll(false); refresh(); });
  addEventListener("resize", drawFlows);
  addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== $("search")) { event.preventDefault(); $("search").focus(); }
    if (event.key === "Escape" && !$("detail").hidden) closeDetail();
  });
})();
