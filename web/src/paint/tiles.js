// Tiles -> canvas: WebGL2 where there is one (numbers as textures, the ramp in the shader), else a plain canvas.

import { ramp, THEMES } from "../core/colour.js";

const KEPT = 160; // textures or canvases
const VERTEX = `#version 300 es
uniform vec4 box; uniform vec2 cells; out vec2 at;
void main() { vec2 c = vec2(gl_VertexID & 1, gl_VertexID >> 1); at = c * cells; gl_Position = vec4(box.xy + c * box.zw, 0, 1); }`;
const FRAGMENT = `#version 300 es
precision highp float; precision highp sampler2D;
uniform sampler2D tile; uniform sampler2D ramp; uniform float gain; uniform vec2 cells; in vec2 at; out vec4 colour;
void main() {
  float value = texelFetch(tile, ivec2(min(at, cells - 1.)), 0).r * gain;
  colour = texelFetch(ramp, ivec2(value > 0. ? clamp(floor(.5 + 255. * sqrt(value)), 1., 255.) : 0., 0), 0);
}`;

// -> {kind, draw(items, top, theme)}; items as views/atlas.js makes them, colours by the square root of value / top
export function tilePainter(canvas) {
  const gl = canvas.getContext("webgl2", { antialias: false, preserveDrawingBuffer: true });
  const known = new Map();
  const kept = (item, make, drop) => {
    const held = known.get(item.key);
    if (held?.blob === item.blob) {
      known.delete(item.key);
      known.set(item.key, held);
      return held.made;
    }
    if (held) drop(held.made);
    const made = make();
    known.set(item.key, { blob: item.blob, made });
    for (const [key, old] of known) {
      if (known.size <= KEPT) break;
      drop(old.made);
      known.delete(key);
    }
    return made;
  };
  return gl ? withGl(canvas, gl, kept) : withCanvas(canvas, kept);
}

function withGl(canvas, gl, kept) {
  const program = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  const place = (name) => gl.getUniformLocation(program, name);
  const [box, cells, gain] = ["box", "cells", "gain"].map(place);
  gl.uniform1i(place("tile"), 0);
  gl.uniform1i(place("ramp"), 1);
  gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  const texture = (unit, inner, width, height, format, type, data) => {
    const made = gl.createTexture();
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(gl.TEXTURE_2D, made);
    gl.texImage2D(gl.TEXTURE_2D, 0, inner, width, height, 0, format, type, data);
    for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, name, gl.NEAREST);
    return made;
  };
  let worn = "";
  return {
    kind: "webgl2",
    draw(items, top, theme) {
      if (worn !== theme) {
        texture(1, gl.RGBA8, 256, 1, gl.RGBA, gl.UNSIGNED_BYTE, Uint8Array.from(ramp(theme).flatMap((c) => [...c, 255])));
        worn = theme;
      }
      const { width, height } = canvas;
      const dpr = width / parseFloat(canvas.style.width);
      gl.viewport(0, 0, width, height);
      gl.clearColor(...[1, 3, 5].map((i) => parseInt(THEMES[theme].wash.slice(i, i + 2), 16) / 255), 1);
      gl.clear(gl.COLOR_BUFFER_BIT);
      for (const item of items) {
        const { shape, data } = item.blob;
        const made = kept(item, () => texture(0, gl.R32F, shape[1], shape[0], gl.RED, gl.FLOAT, data), (old) => gl.deleteTexture(old));
        gl.activeTexture(gl.TEXTURE0);
        gl.bindTexture(gl.TEXTURE_2D, made);
        const [sx, sy] = [(2 * dpr) / width, (2 * dpr) / height];
        gl.uniform4f(box, item.x * sx - 1, 1 - item.y * sy, item.w * sx, -item.h * sy);
        gl.uniform2f(cells, shape[1], shape[0]);
        gl.uniform1f(gain, item.unit / top);
        gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
      }
    },
  };
}

function withCanvas(canvas, kept) {
  const pen = canvas.getContext("2d");
  return {
    kind: "canvas",
    draw(items, top, theme) {
      const dpr = canvas.width / parseFloat(canvas.style.width);
      pen.setTransform(dpr, 0, 0, dpr, 0, 0);
      pen.fillStyle = THEMES[theme].wash;
      pen.fillRect(0, 0, canvas.width, canvas.height);
      pen.imageSmoothingEnabled = false;
      const colours = ramp(theme);
      for (const item of items) {
        const { shape, data } = item.blob;
        const gain = item.unit / top;
        const look = `${theme}${gain}`;
        let made = kept(item, () => ({}), () => {});
        if (made.look !== look) {
          const paper = document.createElement("canvas");
          [paper.width, paper.height] = [shape[1], shape[0]];
          const image = new ImageData(shape[1], shape[0]);
          data.forEach((value, i) => {
            const v = value * gain;
            image.data.set([...colours[v > 0 ? Math.min(255, Math.max(1, Math.floor(0.5 + 255 * Math.sqrt(v)))) : 0], 255], 4 * i);
          });
          paper.getContext("2d").putImageData(image, 0, 0);
          Object.assign(made, { look, paper });
        }
        pen.drawImage(made.paper, item.x, item.y, item.w, item.h);
      }
    },
  };
}
