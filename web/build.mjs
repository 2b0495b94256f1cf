// Builds the page: web/ -> src/regard/lens/page/index.html and draw.js. `node build.mjs --check` only compares.

import { readFile, writeFile, mkdir } from "node:fs/promises";
import { gzipSync } from "node:zlib";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const target = join(here, "../src/regard/lens/page");
const LIMIT = 60 * 1024;

const bundle = async (entry, options) => {
  const result = await build({ entryPoints: [join(here, entry)], bundle: true, write: false, minify: true, format: "iife", charset: "utf8", legalComments: "none", absWorkingDir: here, ...options });
  return result.outputFiles[0].text;
};

const script = (await bundle("src/app/main.js", { target: "es2022" })).trim().replace(/<\/(script)/gi, "<\\/$1").replace(/<!--/g, "<\\!--");
const draw = await bundle("src/draw.js", { target: "es2020" });
const style = (await bundle("style.css", { loader: { ".css": "css" }, format: undefined })).trim();
const shell = await readFile(join(here, "shell.html"), "utf8");
const page = shell.replace("/*style*/", () => style).replace("/*script*/", () => script);

const size = gzipSync(page, { level: 9 }).length + gzipSync(draw, { level: 9 }).length;
if (size > LIMIT) throw new Error(`page: index.html and draw.js are ${size} bytes gzipped; the limit is ${LIMIT}`);

await mkdir(target, { recursive: true });
for (const [name, text] of [["index.html", page], ["draw.js", draw]]) {
  const path = join(target, name);
  if (process.argv.includes("--check")) {
    if ((await readFile(path, "utf8")) !== text) throw new Error(`${name} is not what its sources build; run npm ci && node build.mjs in web/`);
  } else await writeFile(path, text);
}
console.log(`index.html and draw.js: ${size} bytes gzipped of ${LIMIT}`);
