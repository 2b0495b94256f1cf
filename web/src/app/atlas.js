// The large map: a canvas that is dragged, zoomed and walked over by keys, with its words, its partial mark and its table.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import * as S from "../core/selection.js";
import { clampCamera, tokenAt, unitAt, wholeMap, zoomAt } from "../core/tiles.js";
import { percent } from "../core/words.js";
import { html } from "../paint/dom.js";
import { tilePainter } from "../paint/tiles.js";
import { atlasTable, atlasView, saidAt, sizeOf } from "../views/atlas.js";
import { commit, recording, selection, theme, tiles, tilesArrived } from "./store.js";

export function Atlas({ width }) {
  const canvas = useRef(null);
  const held = useRef({}); // painter, camera while it moves, frame
  const [said, setSaid] = useState(null);
  const [table, setTable] = useState(false);
  const [state, setState] = useState({ share: 1, missing: 0, level: 0, top: 1 });
  const s = selection.value;
  const size = sizeOf(recording.value, s);
  const room = { width, height: Math.min(width, 720, Math.max(280, innerHeight - 220)) };
  const camera = clampCamera(s.camera ?? wholeMap(size, room), size, room);
  const own = held.current;
  own.room = room;
  own.size = size;
  if (!own.moving) own.camera = camera;

  const paint = () => {
    own.frame = 0;
    if (!own.painter) return;
    const view = atlasView(recording.value, selection.value, own.camera, own.room, tiles());
    own.painter.draw(view.items, view.top, theme.value);
    own.level = view.level;
    setState((old) => (["share", "missing", "level", "top"].every((name) => old[name] === view[name]) ? old : { share: view.share, missing: view.missing, level: view.level, top: view.top }));
  };
  const soon = () => (own.frame ||= requestAnimationFrame(paint));
  tilesArrived.value;
  useLayoutEffect(() => {
    own.painter = tilePainter(canvas.current);
    canvas.current.dataset.painter = own.painter.kind;
    return () => cancelAnimationFrame(own.frame);
  }, []);
  useLayoutEffect(() => {
    const dpr = Math.min(2, devicePixelRatio || 1);
    [canvas.current.width, canvas.current.height] = [room.width, room.height].map((px) => Math.round(px * dpr));
  }, [room.width, room.height]);
  useLayoutEffect(() => void soon());

  // A moving camera is drawn at once and kept in the address when it rests.
  const move = (next) => {
    tiles().forget();
    own.camera = clampCamera(next, own.size, own.room);
    own.moving = true;
    soon();
    clearTimeout(own.rest);
    own.rest = setTimeout(() => {
      own.moving = false;
      commit({ ...selection.value, camera: own.camera }, "move map");
    }, 250);
  };
  const point = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const read = (at) => setSaid(at && saidAt(recording.value, selection.value, at, own.level, tiles()));
  useEffect(() => {
    const wheel = (event) => {
      event.preventDefault();
      const [x, y] = point(event);
      move(zoomAt(own.camera, 2 ** (-event.deltaY / (event.deltaMode ? 8 : 240)), x, y, own.size, own.room));
    };
    const node = canvas.current;
    node.addEventListener("wheel", wheel, { passive: false });
    return () => node.removeEventListener("wheel", wheel);
  }, []);

  const down = (event) => {
    event.currentTarget.setPointerCapture(event.pointerId);
    own.drag = { x: event.clientX, y: event.clientY, far: 0 };
  };
  const over = (event) => {
    const [x, y] = point(event);
    if (!own.drag) return read(tokenAt(own.camera, x, y, own.size, own.room));
    const [dx, dy] = [event.clientX - own.drag.x, event.clientY - own.drag.y];
    own.drag = { x: event.clientX, y: event.clientY, far: own.drag.far + Math.abs(dx) + Math.abs(dy) };
    move({ ...own.camera, row: own.camera.row - dy / own.camera.scale, col: own.camera.col - dx / own.camera.scale });
  };
  const up = (event) => {
    const far = own.drag?.far ?? 9;
    own.drag = null;
    const at = tokenAt(own.camera, ...point(event), own.size, own.room);
    if (far < 4 && at) choose(at);
  };
  const choose = (at) => {
    const { query_side, key_side } = recording.value.attention(s.attention);
    const [word, target] = [[query_side, at.row], [key_side, at.col]].map(([side, token]) => unitAt(recording.value.units(side, s.unit), token));
    commit({ ...S.focusWord({ ...s, mode: "to" }, query_side, word), target }, "pair");
  };
  const keys = (event) => {
    const step = 96 / own.camera.scale;
    const middle = [own.room.width / 2, own.room.height / 2];
    const zoom = (factor) => zoomAt(own.camera, factor, ...middle, own.size, own.room);
    const by = (row, col) => ({ ...own.camera, row: own.camera.row + row * step, col: own.camera.col + col * step });
    const at = { row: Math.min(own.size.rows - 1, Math.floor(own.camera.row)), col: Math.min(own.size.cols - 1, Math.floor(own.camera.col)) };
    const does = { ArrowLeft: () => by(0, -1), ArrowRight: () => by(0, 1), ArrowUp: () => by(-1, 0), ArrowDown: () => by(1, 0), "+": () => zoom(2), "=": () => zoom(2), "-": () => zoom(0.5), 0: () => wholeMap(own.size, own.room) }[event.key];
    if (event.key === "Enter") choose(at);
    else if (!does || event.ctrlKey || event.metaKey || event.altKey) return;
    else {
      move(does());
      read({ row: Math.min(own.size.rows - 1, Math.floor(own.camera.row)), col: Math.min(own.size.cols - 1, Math.floor(own.camera.col)) });
    }
    event.preventDefault();
    event.stopPropagation();
  };

  const { failure } = tiles();
  const button = (name, does, text) => html`<button type="button" aria-label=${name} onClick=${does}>${text}</button>`;
  const zoomed = (factor) => () => move(zoomAt(own.camera, factor, room.width / 2, room.height / 2, size, room));
  const cell = 2 ** state.level;
  const kind = (name, text) => html`<button type="button" aria-pressed=${String(s.kind === name)} onClick=${() => commit({ ...s, kind: name }, "kind")}>${text}</button>`;
  const twin = table && atlasTable(recording.value, s, camera, state.level, tiles());
  return html`<div class="map atlas">
    <div class="bar-of-tools">
      ${button("closer", zoomed(2), "+")}${button("further", zoomed(0.5), "−")}${button("the whole map", () => move(wholeMap(size, room)), "whole")}
      <span class="pair" role="group" aria-label="what a cell shows">${kind("max", "largest weight")}${kind("mass", "share")}</span>
      <button type="button" aria-pressed=${String(table)} onClick=${() => setTable(!table)}>as a table</button>
      <span class="note" role="status">${failure ? failure.text : state.missing ? "computing …" : state.share < 1 ? `partial: ${Math.max(1, Math.floor(100 * state.share))} % of the rows` : "exact"}</span>
    </div>
    <div class="plane" role="application" tabindex="0" aria-roledescription="map" aria-label=${`map of layer ${s.layer} head ${s.head}: ${size.rows} rows look at ${size.cols} columns. Arrows move, plus and minus zoom, 0 shows all, Enter opens the pair in the middle.`} onKeyDown=${keys} style=${{ height: `${room.height}px` }}>
      <canvas ref=${canvas} aria-hidden="true" style=${{ width: `${room.width}px`, height: `${room.height}px` }}
        onPointerDown=${down} onPointerMove=${over} onPointerUp=${up} onPointerLeave=${() => !own.drag && setSaid(null)}></canvas>
    </div>
    <p class="note said" role="status">${said ?? "Drag to move, turn the wheel to zoom. A row is what one token looks at."}</p>
    <p class="note">${cell > 1 ? `One cell stands for ${cell} × ${cell} weights${s.kind === "mass" ? ": the share that one of its rows gives to its columns" : ": the largest of them"}.` : "One cell is one weight."}${" "}
      Colour grows with the square root; the strongest is ${percent(state.top)}. Rows and columns are subwords, ${size.rows.toLocaleString("en")} × ${size.cols.toLocaleString("en")}.</p>
    ${twin && html`<div class="table" tabindex="0" role="region" aria-label="map as a table"><table>
      <caption>layer ${s.layer} head ${s.head}: the cells in the middle of the picture${cell > 1 ? `, ${cell} × ${cell} weights each` : ""}</caption>
      <thead><tr><td></td>${twin.head.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
      <tbody>${twin.rows.map((row) => html`<tr><th scope="row">${row.name}</th>${row.cells.map((text) => html`<td>${text}</td>`)}</tr>`)}</tbody>
    </table></div>`}
  </div>`;
}
