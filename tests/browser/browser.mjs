// A Chromium that notes what a page must not do: errors, violations of its policy, requests.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.env.NODE_FOLDER}/package.json`));
const { chromium } = require("playwright-core");
const AXE = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
export const library = (name) => require(name);
export const asked = JSON.parse(process.argv[2]);
export const answer = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

export async function opened(options) {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
  const context = await browser.newContext(options);
  const noted = { errors: [], requests: [] };
  await context.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));
  });
  context.on("request", (request) => noted.requests.push(request.url()));
  context.on("console", (message) => { if (["error", "warning"].includes(message.type())) noted.errors.push(message.text()); });
  context.on("weberror", (error) => noted.errors.push(String(error.error())));
  return { browser, context, noted };
}

// Boxes of texts that lie on each other, that are cut, or that stick out of the window
export const boxes = (frame) => frame.evaluate(() => {
  const found = [];
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const named = (node) => node.textContent.trim().slice(0, 40);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const parent = node.parentElement;
    if (!node.textContent.trim() || !parent.checkVisibility() || parent.closest("script, style, noscript, title")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const scrolls = parent.closest(".scroll, pre");
    for (const box of range.getClientRects()) {
      if (!scrolls && (box.right > window.innerWidth + 1 || box.left < -1)) found.push(`outside: ${named(node)}`);
      texts.push({ node, box });
    }
    for (let at = parent; at && !scrolls; at = at.parentElement) {
      const style = getComputedStyle(at);
      const hides = style.overflowX === "hidden" && style.textOverflow !== "ellipsis";
      if (hides && at.scrollWidth > at.clientWidth + 1) found.push(`cut: ${named(node)}`);
    }
  }
  texts.sort((a, b) => a.box.top - b.box.top);
  texts.forEach(({ node, box }, place) => {
    for (let next = place + 1; next < texts.length && texts[next].box.top < box.bottom - 3; next += 1) {
      const other = texts[next];
      if (other.node === node) continue;
      const wide = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
      const high = Math.min(box.bottom, other.box.bottom) - other.box.top;
      const inside = (one) => one.parentElement.closest(".scroll");
      if (wide > 2 && high > 3 && inside(node) === inside(other.node)) found.push(`overlap: ${named(node)} | ${named(other.node)}`);
    }
  });
  if (document.documentElement.scrollWidth > window.innerWidth + 1) found.push(`the page is ${document.documentElement.scrollWidth} wide`);
  return found;
});

export async function accessibility(frame) {
  await frame.evaluate(AXE);
  return frame.evaluate(async () => {
    const result = await globalThis.axe.run(document);
    return result.violations.map((one) => `${one.id}: ${one.nodes.slice(0, 3).map((node) => `${node.html} ${node.any.map((check) => check.message).join()}`).join(" ; ")}`);
  });
}
