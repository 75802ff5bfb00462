// A chat with the page in it, against a real server: {url, token, project, model, data, pictures?} -> what happened.
import { createServer } from "node:http";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { accessibility, answer, asked, boxes, library, opened } from "./browser.mjs";

const client_of = async () => {
  const { Client, StreamableHTTPClientTransport } = library("@modelcontextprotocol/client");
  const apps = { "io.modelcontextprotocol/ui": { mimeTypes: ["text/html;profile=mcp-app"] } };
  const client = new Client({ name: "test host", version: "1" }, { capabilities: { extensions: apps } });
  await client.connect(new StreamableHTTPClientTransport(new URL(asked.url), { requestInit: { headers: { Authorization: `Bearer ${asked.token}` } } }));
  return client;
};
const served = async (host, files) => {
  const server = createServer((request, response) => {
    const file = files[request.url];
    response.writeHead(file ? 200 : 204, file ? file.headers : {}).end(file && file.text);
  });
  await new Promise((resolve) => server.listen(0, host, resolve));
  return { server, origin: `http://${host}:${server.address().port}` };
};

const client = await client_of();
const { tools } = await client.listTools();
const uri = tools.find((tool) => tool.name === "quantize")._meta.ui.resourceUri;
const { contents: [view] } = await client.readResource({ uri });
const script = await library("esbuild").build({ entryPoints: [join(import.meta.dirname, "host.js")], bundle: true, write: false, format: "iife",
  nodePaths: [join(process.env.NODE_FOLDER, "node_modules")] });
const html = { "content-type": "text/html; charset=utf-8" };
const sandbox = await served("localhost", { "/view.html": { text: view.text, headers: { ...html,
  "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'none'" } } });
const host = await served("127.0.0.1", {
  "/": { text: "<!doctype html><title>chat</title><body><script src=/host.js></script>", headers: html },
  "/host.js": { text: script.outputFiles[0].text, headers: { "content-type": "text/javascript" } } });

const { browser, context, noted } = await opened({ colorScheme: "light", viewport: { width: 1000, height: 1600 } });
const page = await context.newPage();
const calls = [];
await page.exposeFunction("callTool", (params) => { calls.push(params); return client.callTool(params); });
await page.goto(host.origin);
const until = (what, of, argument) => page.waitForFunction(what, argument, { timeout: of });
const inside = () => page.frames().find((frame) => frame.url().startsWith(sandbox.origin));
const picture = async (name) => { if (asked.pictures) await page.screenshot({ path: join(asked.pictures, `chat-${name}.png`), fullPage: true }); };
const whole = () => inside().waitForFunction(() => window.innerHeight >= document.documentElement.scrollHeight, undefined, { timeout: 5_000 }); // the frame cuts nothing
const said = (selector) => inside().locator(selector).first().innerText();

const start = async (theme) => {
  await page.evaluate(([source, context]) => window.begin(source, context), [`${sandbox.origin}/view.html`, { theme, displayMode: "inline" }]);
  await until(() => window.noted.ready === 1, 10_000);
  const given = { model: asked.model, data: asked.data, project: asked.project, timing: "quick", wait_s: 0 };
  await page.evaluate((given) => window.bridge.sendToolInput({ arguments: given }), given);
  const waiting = await said("h1");
  const result = await client.callTool({ name: "quantize", arguments: given });
  if (result.isError) throw new Error(JSON.stringify(result.structuredContent));
  await page.evaluate((result) => window.bridge.sendToolResult(result), result);
  await inside().locator(".badge.running", { hasText: /STARTING|QUEUED|RUNNING/ }).waitFor({ timeout: 10_000 });
  return { waiting, id: result.structuredContent.run_id };
};

// A run is watched until it ends
const first = await start("light");
const background = () => inside().evaluate(() => getComputedStyle(document.body).backgroundColor);
const light = await background();
await page.evaluate(() => window.bridge.setHostContext({ theme: "dark", displayMode: "inline", styles: { variables: { "--color-background-primary": "#101820", "--color-text-primary": "#f0f4f8" } } }));
await inside().waitForFunction(() => document.documentElement.dataset.theme === "dark");
const dark = await background();
await page.evaluate(() => { window.noted.sizes.length = 0; window.frame.style.width = "360px"; });
await until(() => window.noted.sizes.some((size) => size.width === 360), 5_000);
await inside().getByRole("button", { name: "Cancel the run" }).click();
await inside().getByRole("button", { name: "No", exact: true }).click();
const refused = await page.evaluate(() => window.noted.messages.length);
const looking = (await accessibility(inside())).map((one) => `axe, running: ${one}`);
await page.evaluate(() => { document.body.style.paddingTop = "9000px"; });
await page.waitForTimeout(1_000); // a question that was on its way is answered
const before = calls.length;
await page.waitForTimeout(6_000); // longer than the page waits between two questions
const unseen = calls.length - before;
await page.evaluate(() => { document.body.style.paddingTop = "0"; });
let arriving = 0;
const ended = inside().locator(".badge.ok, .badge.no_gain, .badge.guard_failed");
for (const stop = Date.now() + 150_000; Date.now() < stop && !(await ended.count());) {
  const rows = await inside().locator("section", { hasText: "Candidates so far" }).locator("tbody tr").count();
  if (rows > arriving) await picture(`running-${rows}`);
  arriving = Math.max(arriving, rows);
  await page.waitForTimeout(200);
}
await page.evaluate(() => { window.frame.style.width = "900px"; });
await ended.waitFor({ timeout: 1_000 });
await whole();
await picture("finished");
const watched = { calls: [...calls], verdict: await said(".badge"), title: await said("h1"), sizes: await page.evaluate(() => window.noted.sizes) };
const found = [...looking];
for (const width of [360, 800, 1400]) {
  await page.setViewportSize({ width: Math.max(width, 400), height: 900 });
  await page.evaluate((width) => { window.frame.style.width = `${width}px`; }, width);
  await inside().waitForFunction((width) => window.innerWidth === width, width);
  await whole();
  found.push(...(await boxes(inside())).map((one) => `${width} px ${one}`));
}
found.push(...(await accessibility(inside())).map((one) => `axe ${one}`));
await inside().locator(".actions button, button", { hasText: "Repeat with effort best" }).first().click();
await until(() => window.noted.messages.length === 1, 5_000);

// Another is cancelled from the page: the chat is asked, and the chat calls
calls.length = 0;
const second = await start("dark");
await inside().getByRole("button", { name: "Cancel the run" }).click();
await inside().getByRole("button", { name: "Yes, ask for it" }).click();
await until(() => window.noted.messages.length === 2, 5_000);
const messages = await page.evaluate(() => window.noted.messages);
const text = messages[1].content[0].text;
await client.callTool({ name: "runs", arguments: JSON.parse(text.slice(text.indexOf(" with ") + 6)) });
await inside().locator(".badge", { hasText: "CANCELLED" }).waitFor({ timeout: 20_000 });
await whole();
await picture("cancelled");
const cancelled = { calls: [...calls], title: await said("h1"), verdict: await said(".badge") };

const own = [`${host.origin}/`, `${host.origin}/host.js`, `${host.origin}/favicon.ico`, `${sandbox.origin}/view.html`];
answer({ bytes: view.text.length, mime: view.mimeType, first, second, light, dark, refused, unseen, arriving, watched, found, messages, cancelled,
  errors: noted.errors, requests: noted.requests.filter((url) => !own.includes(url)) });
await browser.close();
await client.close();
process.exit(0);
