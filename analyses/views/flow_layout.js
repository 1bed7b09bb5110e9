// Where everything stands in the flow view. The same computation as analyses/views/flow_layout.py, which draws the static pictures; a test
// compares the two.
(() => {
  "use strict";
  const RADIUS = 12, SMALLEST_RADIUS = 2.5, GUTTER = 76, MARGIN = 18, TOP = 16, BOTTOM = 34, SPACING = 26, WIDEST_SPACING = 58, LEAST_ROW = 11, GAP = 20;
  const CHARACTER = 7.3, LABEL_CHARACTERS = 11;

  // nodes: all; drawn: indices. Gives marks (Map index -> {x, y, r}), columns and rows.
  function place(nodes, drawn, labels, width, height) {
    const [rows, rowOf] = rowsOf(drawn.map((i) => nodes[i]), height);
    const step = (height - TOP - BOTTOM) / Math.max(rows.length, 1);
    const cells = new Map();
    for (const i of drawn) {
      const key = `${rowOf.get(rowKey(nodes[i]))} ${nodes[i].position}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(i);
    }
    const fullest = labels.map(() => 0);
    for (const [key, cell] of cells) {
      const position = Number(key.split(" ")[1]);
      fullest[position] = Math.max(fullest[position], cell.length);
    }
    const columns = columnsOf(fullest, labels, width);
    const centres = new Map(columns.filter((c) => fullest[c.position]).map((c) => [c.position, c]));
    const largest = Math.max(0, ...drawn.filter((i) => nodes[i].score !== null && nodes[i].kind !== "logits").map((i) => Math.abs(nodes[i].score))) || 1;
    const marks = new Map();
    for (const [key, cell] of cells) {
      const [row, position] = key.split(" ").map(Number);
      cell.sort((a, b) => (nodes[a].layer ?? 0) - (nodes[b].layer ?? 0) || nodes[a].order - nodes[b].order);
      const column = centres.get(position);
      const spacing = Math.min(WIDEST_SPACING, column.width / cell.length);
      const radius = Math.max(Math.min(RADIUS, 0.46 * step, 0.48 * Math.max(spacing, 7)), SMALLEST_RADIUS);
      const y = height - BOTTOM - (row + 0.5) * step;
      cell.forEach((i, n) => {
        const share = nodes[i].score === null ? 0 : Math.min(Math.abs(nodes[i].score) / largest, 1);
        const r = SMALLEST_RADIUS + (radius - SMALLEST_RADIUS) * Math.sqrt(share);
        marks.set(i, { x: column.centre + (n - (cell.length - 1) / 2) * spacing, y, r });
      });
    }
    return { marks, columns, rows: rows.map((name, n) => ({ name, y: height - BOTTOM - (n + 0.5) * step })), step };
  }

  const rowKey = (node) => `${node.kind} ${node.layer ?? ""}`;

  function rowsOf(marks, height) {
    const found = new Set(marks.map(rowKey));
    const layers = [...new Set(marks.filter((m) => m.layer !== null).map((m) => m.layer))].sort((a, b) => a - b);
    const together = Math.max(1, Math.ceil((found.size * LEAST_ROW) / Math.max(height - TOP - BOTTOM, 1)));
    const names = [], rowOf = new Map();
    const add = (name, members) => {
      const here = members.filter((member) => found.has(member));
      if (!here.length) return;
      for (const member of here) rowOf.set(member, names.length);
      names.push(name);
    };
    add("embed", ["embed "]);
    for (let i = 0; i < layers.length; i += together) {
      const group = layers.slice(i, i + together);
      const label = group.length === 1 ? `L${group[0]}` : `L${group[0]}–${group[group.length - 1]}`;
      add(`${label} stream`, group.map((layer) => `early stream ${layer}`));
      add(`${label} features`, group.flatMap((layer) => [`early feature ${layer}`, `early error ${layer}`]));
      add(`${label} heads`, group.map((layer) => `head ${layer}`));
      add(`${label} stream`, group.map((layer) => `middle stream ${layer}`));
      add(`${label} mlp`, group.map((layer) => `mlp ${layer}`));
      add(`${label} features`, group.flatMap((layer) => [`feature ${layer}`, `error ${layer}`]));
      add(`${label} stream`, group.map((layer) => `late stream ${layer}`));
    }
    add("logits", ["logits "]);
    return [names, rowOf];
  }

  function columnsOf(fullest, labels, width) {
    const texts = labels.map((label) => Math.min([...label].length, LABEL_CHARACTERS) * CHARACTER + 10);
    const room = width - GUTTER - MARGIN;
    const needed = fullest.map((n, i) => (n ? Math.max(texts[i], n * SPACING + 8) : texts[i]));
    const sum = (list) => list.reduce((a, b) => a + b, 0);
    let units = labels.map((_, i) => [i, 1, needed[i]]);
    if (sum(needed) > room) {
      units = [];
      for (let i = 0; i < labels.length; ) {
        let count = 1;
        if (!fullest[i]) while (i + count < labels.length && !fullest[i + count]) count += 1;
        units.push(fullest[i] ? [i, 1, needed[i]] : [i, count, GAP]);
        i += count;
      }
    }
    const natural = sum(units.map((u) => u[2]));
    const weights = units.map((u) => fullest[u[0]]);
    const total = sum(weights) || 1;
    let left = GUTTER;
    return units.map(([position, count, size], n) => {
      const taken = natural > room ? (size * room) / natural : size + ((room - natural) * weights[n]) / total;
      left += taken;
      return { position, count, centre: left - taken / 2, width: taken };
    });
  }

  // The two control points of an edge's cubic Bezier curve, [x1, y1, x2, y2].
  function curve(source, target) {
    const rise = target.y - source.y, across = Math.abs(target.x - source.x);
    const bow = across < 1.5 * SPACING && Math.abs(rise) > 2.5 * SPACING ? Math.min(46, 0.1 * Math.abs(rise)) : 0;
    const sag = Math.abs(rise) < 1 ? Math.min(30, 0.12 * across) : 0;
    return [source.x + bow, source.y + 0.4 * rise + sag, target.x + bow, target.y - 0.4 * rise + sag];
  }

  function outline(kind, { x, y, r }) {
    if (kind === "head") return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
    if (kind === "mlp") return `M${x - 0.88 * r} ${y - 0.88 * r}h${1.76 * r}v${1.76 * r}h${-1.76 * r}Z`;
    if (kind === "embed") return `M${x} ${y - 1.2 * r}L${x + 1.2 * r} ${y}L${x} ${y + 1.2 * r}L${x - 1.2 * r} ${y}Z`;
    if (kind.endsWith("feature")) return `M${x - r} ${y}L${x - 0.5 * r} ${y - 0.87 * r}H${x + 0.5 * r}L${x + r} ${y}L${x + 0.5 * r} ${y + 0.87 * r}H${x - 0.5 * r}Z`;
    if (kind.endsWith("stream")) return `M${x - r} ${y - 0.4 * r}h${2 * r}v${0.8 * r}h${-2 * r}Z`;
    if (kind.endsWith("error")) return `M${x} ${y + 1.2 * r}L${x + 1.15 * r} ${y - 0.8 * r}H${x - 1.15 * r}Z`;
    return `M${x} ${y - 1.2 * r}L${x + 1.15 * r} ${y + 0.8 * r}H${x - 1.15 * r}Z`;
  }

  lensRelevance.flow = { place, curve, outline };
})();
