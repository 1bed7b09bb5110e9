// Puts interactive pictures in the place of their static twins. Loaded once per page; loading it again does nothing.
(() => {
  "use strict";
  if (window.lensRelevance) return;

  const components = {}; // name -> function (body, props)
  const waiting = {}; // name -> [function], for pictures that come before their script
  let circuitsVisAsked = false;
  let mounts = 0;

  function element(tag, className = "", text = "") {
    return Object.assign(document.createElement(tag), { className, textContent: text });
  }

  function define(name, component) {
    components[name] = component;
    (waiting[name] || []).splice(0).forEach((run) => run());
  }

  // The same picture may be displayed twice in a notebook, so an id names every figure with this content that has not been mounted.
  function show(id, name, props) {
    if (!components[name]) {
      (waiting[name] ||= []).push(() => show(id, name, props));
      return;
    }
    document.querySelectorAll(`[data-lr-view="${id}"]`).forEach((figure) => {
      if (figure.lensRelevance) return;
      figure.lensRelevance = props;
      components[name](figure.querySelector(".lr-body"), props);
      figure.dataset.lrReady = name;
    });
  }

  // The static picture stays for paper, where canvases cannot be laid out anew.
  const keepForPaper = (body) => body.querySelector(".lr-static").classList.add("lr-on-paper");

  // CircuitsVis's script comes gzipped in base64. Where the browser cannot inflate it, the static pictures stay.
  async function installCircuitsVis(base64) {
    if (circuitsVisAsked || typeof DecompressionStream === "undefined") return;
    circuitsVisAsked = true;
    const bytes = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
    const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(inflated).text();
    document.head.append(script);
    for (const name of ["ColoredTokens", "ColoredTokensMulti", "AttentionHeads"]) {
      define(name, (body, props) => {
        const mount = element("div", "lr-circuitsvis");
        mount.id = `lr-circuitsvis-${(mounts += 1)}`;
        keepForPaper(body);
        body.prepend(mount, scale(props.maxValue ?? props.positiveBounds[0]));
        window.CircuitsVis.render(mount.id, window.CircuitsVis[name], props);
      });
    }
  }

  // One tooltip for the page, beside the pointer or the focused element and never outside the window.
  let tip = null;
  function showTip(lines, x, y) {
    if (!tip) {
      tip = element("div", "lr-tip");
      tip.setAttribute("role", "tooltip");
      document.body.append(tip);
    }
    tip.replaceChildren(...lines.map((line, i) => element(i ? "div" : "strong", "", line)));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const right = document.documentElement.clientWidth - box.width - 6;
    tip.style.left = `${Math.max(6, Math.min(x + 14, right))}px`;
    tip.style.top = `${y + 18 + box.height > window.innerHeight ? Math.max(6, y - box.height - 12) : y + 18}px`;
  }
  const hideTip = () => tip && (tip.hidden = true);

  // What the colours mean, from -limit to limit.
  function scale(limit) {
    const text = Number(limit).toPrecision(3).replace(/\.?0+(?=e|$)/, "");
    const bar = element("p", "lr-scale");
    bar.append(element("span", "", `−${text} against`), element("i"), element("span", "", `for +${text}`));
    return bar;
  }

  // A heat map is a table with a tooltip (hover, tap, focus) and arrow keys.
  function heatTable(map, numbered) {
    const table = element("table", `lr-heat${map.steep ? " lr-steep" : ""}${numbered ? " lr-numbered" : ""}`);
    table.setAttribute("aria-label", map.title);
    if (map.titled) table.append(element("caption", "", map.title));
    const heading = (scope, text) => Object.assign(element("th", "", text), { scope });
    const head = element("tr");
    const corner = element("th", "lr-corner");
    corner.append(`${map.columnName} →`, element("br"), `${map.rowName} ↓`);
    head.append(corner, ...map.columns.map((text) => {
      const made = heading("col");
      made.append(element("span", "", text));
      return made;
    }));
    table.createTHead().append(head);
    const rows = map.rows.map((text, i) => {
      const row = element("tr");
      row.append(heading("row", text), ...map.values[i].map((value, j) => {
        const strength = Math.min(Math.abs(value) / map.limit, 1);
        const cell = element("td", `${value < 0 ? "lr-neg" : "lr-pos"}${strength > 0.6 ? " lr-strong" : ""}`);
        cell.style.setProperty("--v", strength.toFixed(3));
        Object.assign(cell.dataset, { value, tip: map.tips[i][j] });
        cell.setAttribute("aria-label", map.tips[i][j]);
        cell.tabIndex = -1;
        if (numbered) cell.append(element("span", "", map.numbers[i][j]));
        return cell;
      }));
      return row;
    });
    table.createTBody().append(...rows);
    const scroll = element("div", "lr-scroll");
    scroll.append(table);
    return scroll;
  }
  define("HeatMap", (body, { maps }) => {
    const heats = element("div", "lr-heats");
    heats.append(...maps.map((map) => heatTable(map, Boolean(map.numbers))));
    body.replaceChildren(heats, scale(maps[0].limit));
    const rows = [...body.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]);
    if (rows[0]?.[0]) rows[0][0].tabIndex = 0;
    const cellOf = (event) => event.target.closest?.("td[data-tip]");
    const read = (cell, x, y) => showTip(cell.dataset.tip.split("\n"), x, y);
    body.addEventListener("pointermove", (event) => {
      const cell = cellOf(event);
      if (cell) read(cell, event.clientX, event.clientY);
      else hideTip();
    });
    body.addEventListener("pointerleave", hideTip);
    body.addEventListener("focusout", hideTip);
    body.addEventListener("focusin", (event) => {
      const cell = cellOf(event);
      if (!cell) return;
      const box = cell.getBoundingClientRect();
      read(cell, box.right, box.bottom - 12);
    });
    body.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      const cell = cellOf(event);
      if (event.key === "Escape") hideTip();
      if (!step || !cell) return;
      event.preventDefault();
      const y = rows.findIndex((row) => row.includes(cell));
      const next = rows[y + step[0]]?.[rows[y].indexOf(cell) + step[1]];
      if (!next) return;
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });

  window.lensRelevance = { define, show, keepForPaper, installCircuitsVis, showTip, hideTip };
})();
