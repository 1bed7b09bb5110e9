// Edges of the flow view. They are drawn on canvases: thousands of curves as elements of the page would be too many.
(() => {
  "use strict";
  const MAX_PIXELS = 16e6; // phones refuse larger canvases
  const LETTERED = 60; // at most so many edges have letters (query, key or value)
  const { curve, signOf } = lensRelevance.flow;

  // view: as flow.js keeps it; root: the element whose colours are taken.
  function edgesOf(view, root) {
    const { edges } = view.data;
    let lines = new Map(), colours = {};

    // To ask for a colour makes the browser compute the page's styles, which takes long while marks move: not in `paint`.
    function readColours() {
      const style = getComputedStyle(root);
      colours = Object.fromEntries(["pos", "neg", "bg", "fg", "muted"].map((name) => [name, style.getPropertyValue(`--lr-${name}`).trim()]));
    }
    function line(i) {
      if (!lines.has(i)) {
        const [s, t] = view.ends(i), from = view.layout.marks.get(s), to = view.layout.marks.get(t);
        lines.set(i, from && to ? [from, to, curve(from, to)] : null); // null: an end is not drawn
      }
      return lines.get(i);
    }
    const along = (t, [from, to, [x1, y1, x2, y2]]) => {
      const u = 1 - t, a = u * u * u, b = 3 * u * u * t, c = 3 * u * t * t, d = t * t * t;
      return [a * from.x + b * x1 + c * x2 + d * to.x, a * from.y + b * y1 + c * y2 + d * to.y];
    };

    function paint(canvas, list, solid) {
      const ratio = Math.min(window.devicePixelRatio || 1, Math.sqrt(MAX_PIXELS / (view.width * view.height)));
      const width = Math.round(view.width * ratio), height = Math.round(view.height * ratio), { k, x, y } = view.zoomed;
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      const context = canvas.getContext("2d");
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, width, height);
      context.setTransform(k * ratio, 0, 0, k * ratio, x * ratio, y * ratio);
      context.lineCap = "round";
      for (const i of list) {
        if (!line(i)) continue;
        const [from, to, [x1, y1, x2, y2]] = line(i), score = edges[i][2], strength = Math.sqrt(Math.abs(score) / view.strongest);
        context.strokeStyle = score < 0 ? colours.neg : colours.pos;
        context.globalAlpha = solid ? 0.95 : 0.25 + 0.6 * strength;
        context.lineWidth = 0.5 + 3.3 * strength + (solid ? 0.6 : 0);
        context.beginPath();
        context.moveTo(from.x, from.y);
        context.bezierCurveTo(x1, y1, x2, y2, to.x, to.y);
        context.stroke();
        if (list.length <= LETTERED && "qkv".includes(edges[i][3] || "-")) letter(context, edges[i][3], along(0.72, line(i)));
      }
    }
    function letter(context, text, [x, y]) {
      context.globalAlpha = 1;
      context.font = "600 10px sans-serif";
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.lineWidth = 3;
      context.strokeStyle = colours.bg;
      context.strokeText(text, x, y);
      context.fillStyle = colours.fg;
      context.fillText(text, x, y);
    }

    // The edge of a list that passes within five pixels of a place, or null.
    function nearest(list, x, y) {
      let best = null, least = (5 / view.zoomed.k) ** 2;
      for (const i of list) {
        const drawn = line(i);
        if (!drawn) continue;
        const [from, to, [x1, y1, x2, y2]] = drawn;
        if (x < Math.min(from.x, to.x, x1, x2) - 6 || x > Math.max(from.x, to.x, x1, x2) + 6 || y < Math.min(from.y, to.y, y1, y2) - 6 || y > Math.max(from.y, to.y, y1, y2) + 6) continue;
        for (let n = 0; n <= 40; n += 1) {
          const [px, py] = along(n / 40, drawn), far = (px - x) ** 2 + (py - y) ** 2;
          if (far <= least) { least = far; best = i; }
        }
      }
      return best;
    }

    // What the small overview shows: a dot for each node, and the part that is in sight.
    function paintOverview(overview, drawn) {
      const context = overview.getContext("2d"), across = overview.width / view.width, down = overview.height / view.height, { k, x, y } = view.zoomed;
      context.clearRect(0, 0, overview.width, overview.height);
      for (const i of drawn) {
        const at = view.layout.marks.get(i), { score } = view.data.nodes[i];
        context.fillStyle = score === null ? colours.muted : colours[signOf(score) === "lr-neg" ? "neg" : "pos"];
        context.fillRect(at.x * across - 1, at.y * down - 1, 2.5, 2.5);
      }
      context.strokeStyle = colours.fg;
      context.strokeRect((-x / k) * across, (-y / k) * down, overview.width / k, overview.height / k);
    }
    return { readColours, paint, paintOverview, nearest, moved: () => (lines = new Map()) };
  }

  Object.assign(lensRelevance.flow, { edgesOf });
})();
