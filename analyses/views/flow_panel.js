// The panel beside the flow view: the strongest paths, or what is known of the node that was opened; and small helpers for the DOM.
(() => {
  "use strict";
  const LISTED = 40; // edges of each direction in an opened node

  const element = (tag, props = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), props);
    made.append(...children);
    return made;
  };
  const button = (text, label, run) => {
    const made = element("button", { type: "button", textContent: text, title: label, onclick: run });
    made.setAttribute("aria-label", label);
    return made;
  };
  const signOf = (score) => (score < 0 ? "lr-neg" : "lr-pos");
  const short = (label) => (label.length <= 11 ? label : label.slice(0, 10) + "…");
  function number(value, signed = true) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const decimals = Math.min(Math.max(3 - Math.ceil(Math.log10(size) + 1e-12), 0), 8);
    const text = size < 1e-4 ? size.toExponential(1).replace("-", "−") : size.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
    return (value < 0 ? "−" : signed ? "+" : "") + text;
  }
  const INPUT = { q: "query", k: "key", v: "value", in: "input" };
  const reads = (nodes, edge) => nodes[edge[1]].name + (edge[3] ? ` (${INPUT[edge[3]] ?? edge[3]})` : "");

  function cell(value, isScore = false) {
    const isNumber = typeof value === "number";
    const text = !isNumber ? value ?? "–" : isScore === true || !Number.isInteger(value) ? number(value) : String(value); // 4 is a position
    const made = element("td", { className: isNumber ? "num" : "", textContent: text });
    if (isNumber) made.dataset.value = value;
    return made;
  }
  function block(title, columns, rows) {
    const table = element("table");
    const numeric = (i) => rows.some((row) => typeof row[i] === "number");
    if (columns.length) table.append(element("tr", {}, ...columns.map((text, i) => element("th", { textContent: text, className: numeric(i) ? "num" : "" }))));
    for (const row of rows) table.append(element("tr", {}, ...row.map((value) => cell(value))));
    return [element("h6", { textContent: title }), table];
  }

  // view: what flow.js offers to the panel (data, incident, where, scoreLine, open, look, state).
  function edgeList(view, title, direction, list, end) {
    if (!list.length) return [];
    const { nodes, edges } = view.data;
    const table = element("table", { className: `lr-flow-${direction}` });
    for (const e of list.slice(0, LISTED)) {
      const other = edges[e][end];
      const by = INPUT[edges[e][3]] ?? edges[e][3];
      const name = end ? reads(nodes, edges[e]) : nodes[other].name + (by ? ` → ${by}` : "");
      const go = element("button", { type: "button", textContent: `${name} at ${view.where(nodes[other])}`, onclick: () => view.open(other, true) });
      const row = element("tr", {}, element("td", {}, element("b", { className: signOf(edges[e][2]) }), go), cell(edges[e][2], true));
      row.dataset.score = edges[e][2];
      row.addEventListener("pointerenter", () => view.look([e]));
      row.addEventListener("pointerleave", () => view.look(null));
      table.append(row);
    }
    const more = list.length > LISTED ? `, the strongest ${LISTED}` : "";
    return [element("h6", { textContent: `${title} (${list.length} ${list.length === 1 ? "edge" : "edges"}${more})` }), table];
  }

  function nodePanel(view, i) {
    const { nodes, edges } = view.data, node = nodes[i], group = view.groupOf(i);
    const pinned = view.state.pinned.has(i);
    const pin = button(pinned ? "Unpin" : "Pin", pinned ? "let the slider hide this node" : "keep this node in sight and named", () => view.pin(i));
    pin.setAttribute("aria-pressed", pinned);
    const parts = [
      element("header", {}, element("h5", { textContent: group ? group.name : node.name }), pin, button("✕", "close", () => view.open(null, true))),
      element("p", { textContent: group ? `${group.members.length} nodes, of which this is ${node.name} at ${view.where(node)}` : `at ${view.where(node)}` }),
      element("p", { className: "lr-flow-score", textContent: view.scoreLine(node.score) }),
    ];
    for (const line of view.patched(node)) parts.push(element("p", { textContent: line, title: "where the effect of patching this node is expected (mean of both directions)" }));
    if (group) parts.push(element("p", {}, button("Ungroup", "take the group apart", () => view.ungroup(group))));
    const readers = Object.entries(node.readers).map(([name, score]) => [INPUT[name] ?? name, score]);
    if (readers.length) parts.push(...block("Relevance of its inputs", [], readers));
    for (const detail of node.details) parts.push(...block(detail.name || "Details", detail.columns, detail.rows));
    const bySize = (list) => [...list].sort((a, b) => Math.abs(edges[b][2]) - Math.abs(edges[a][2]));
    parts.push(
      ...edgeList(view, "Reads from", "in", bySize(view.incident[i].filter((e) => edges[e][1] === i)), 0),
      ...edgeList(view, "Read by", "out", bySize(view.incident[i].filter((e) => edges[e][0] === i)), 1));
    return parts;
  }

  // A path in words: each component once, a head with the input by which the path enters it, and the token where it reads that.
  function pathSteps(data, path) {
    const { nodes, edges, tokens } = data, steps = [];
    path.nodes.forEach((i, n) => {
      if (nodes[i].kind.endsWith("stream")) return;
      const entering = n ? edges[path.edges[n - 1]] : null, before = n ? nodes[path.nodes[n - 1]] : null;
      if (before?.name === nodes[i].name) { // inside a head, from the token it reads at to the token it writes at
        steps[steps.length - 1] = `${nodes[i].name} (${INPUT[entering[3]]} of “${tokens[before.position]}”)`;
      } else {
        const by = entering && "qkv".includes(entering[3] || "-") ? ` (${INPUT[entering[3]]})` : "";
        steps.push(nodes[i].name + ((nodes[i].kind === "embed" || nodes[i].kind.endsWith("error")) ? ` “${tokens[nodes[i].position]}”` : by));
      }
    });
    return steps;
  }

  function overviewPanel(view) {
    const { data, state } = view, parts = [];
    if (data.paths.length) {
      const list = element("ol", { className: "lr-flow-paths" });
      data.paths.forEach((path, n) => {
        const steps = pathSteps(data, path);
        const go = element("button", { type: "button", textContent: steps.join(" → "), onclick: () => view.choosePath(state.path === n ? null : n) });
        go.setAttribute("aria-pressed", state.path === n);
        const item = element("li", { className: state.path === n ? "lr-chosen" : "" }, go, element("span", { textContent: `${number(100 * path.share, false)} % of all paths, weakest edge ${number(path.weakest)}` }));
        item.addEventListener("pointerenter", () => view.look(path.edges));
        item.addEventListener("pointerleave", () => view.look(null));
        list.append(item);
      });
      parts.push(element("h6", { textContent: "Strongest paths" }), list);
    }
    const selected = [...state.selected];
    if (selected.length) {
      const name = element("input", { type: "text", value: `group ${state.groups.length + 1}`, size: 12 });
      name.setAttribute("aria-label", "name of the group");
      const join = button("Group", "draw the selected nodes as one", () => view.group(name.value));
      join.disabled = selected.length < 2;
      parts.push(element("h6", { textContent: `${selected.length} selected` }), element("p", { textContent: selected.map((i) => data.nodes[i].name).join(", ") }), element("p", {}, name, join));
    }
    if (!selected.length) parts.push(element("p", { className: "lr-flow-hint", textContent: "Click a node to open it; Shift and click select nodes to group." }));
    const facts = Object.entries(data.info);
    if (facts.length) {
      const list = element("dl");
      for (const [name, value] of facts) list.append(element("dt", { textContent: name.replaceAll("_", " ") }), element("dd", { textContent: value }));
      parts.push(element("details", { open: !data.paths.length }, element("summary", { textContent: "What this shows, and how to repeat it" }), list));
    }
    return parts;
  }

  Object.assign(lensRelevance.flow, { element, button, signOf, short, number, reads, nodePanel, overviewPanel });
})();
