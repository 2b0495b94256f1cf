// Builds the page: web/ -> src/regard/lens/page/index.html. `node build.mjs --check` only compares.
// One script serves the browser and, where there is no document, QuickJS, in which it only offers regardDraw.

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
const style = (await bundle("style.css", { loader: { ".css": "css" }, format: undefined })).trim();
const shell = await readFile(join(here, "shell.html"), "utf8");
const page = shell.replace("/*style*/", () => style).replace("/*script*/", () => script);

const size = gzipSync(page, { level: 9 }).length;
if (size > LIMIT) throw new Error(`page: index.html is ${size} bytes gzipped; the limit is ${LIMIT}`);

await mkdir(target, { recursive: true });
const path = join(target, "index.html");
if (process.argv.includes("--check")) {
  if ((await readFile(path, "utf8")) !== page) throw new Error("index.html is not what its sources build; run npm ci && node build.mjs in web/");
} else await writeFile(path, page);
console.log(`index.html: ${size} bytes gzipped of ${LIMIT}`);
