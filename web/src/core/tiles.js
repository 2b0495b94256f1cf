// The geometry of a large map: which tiles a camera sees, at which level, and what stands under a point. Pure.

export const CELLS = 256;

export const levelOf = (length) => Math.max(0, Math.ceil(Math.log2(Math.max(1, Math.ceil(length / CELLS)))));

// scale: px a token. The camera that shows everything.
export function wholeMap({ rows, cols }, { width, height }) {
  return { scale: Math.min(width / cols, height / rows, 32), row: rows / 2, col: cols / 2 };
}

export function clampCamera(camera, size, room) {
  const least = Math.min(wholeMap(size, room).scale, 32);
  const within = (value, most) => Math.min(most, Math.max(0, value));
  return { scale: Math.min(32, Math.max(least, camera.scale)), row: within(camera.row, size.rows), col: within(camera.col, size.cols) };
}

// Zoom by a factor about a point of the picture.
export function zoomAt(camera, factor, x, y, size, room) {
  const next = clampCamera({ ...camera, scale: camera.scale * factor }, size, room);
  const shift = 1 / camera.scale - 1 / next.scale;
  return clampCamera({ ...next, row: camera.row + (y - room.height / 2) * shift, col: camera.col + (x - room.width / 2) * shift }, size, room);
}

export const levelFor = (scale, size) => Math.min(levelOf(Math.max(size.rows, size.cols)), Math.max(0, Math.ceil(-Math.log2(scale) - 0.01)));

// -> tiles {level, row, col, x, y, w, h} that lie in the picture at one level
export function tilesIn(camera, level, size, room) {
  const side = CELLS * 2 ** level;
  const [left, top] = [camera.col - room.width / 2 / camera.scale, camera.row - room.height / 2 / camera.scale];
  const span = (from, length, px) => [Math.max(0, Math.floor(from / side)), Math.min(Math.ceil(length / side), Math.ceil((from + px / camera.scale) / side))];
  const [r0, r1] = span(top, size.rows, room.height);
  const [c0, c1] = span(left, size.cols, room.width);
  const found = [];
  for (let row = r0; row < r1; row++)
    for (let col = c0; col < c1; col++)
      found.push({
        level, row, col,
        x: (col * side - left) * camera.scale,
        y: (row * side - top) * camera.scale,
        w: Math.min(side, size.cols - col * side) * camera.scale,
        h: Math.min(side, size.rows - row * side) * camera.scale,
      });
  return found;
}

// The token under a point; null beside the map.
export function tokenAt(camera, x, y, size, room) {
  const row = Math.floor(camera.row + (y - room.height / 2) / camera.scale);
  const col = Math.floor(camera.col + (x - room.width / 2) / camera.scale);
  return row >= 0 && row < size.rows && col >= 0 && col < size.cols ? { row, col } : null;
}

export const tileKey = ({ attention, layer, head, kind }, { level, row, col }) => `tile/${attention}/${layer}/${head}/${kind}/${level}/${row}/${col}`;

// The unit that holds a token, by halving: units stand in the order of their tokens.
export function unitAt(units, token) {
  let [low, high] = [0, units.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (units[middle].tokens[0] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}
