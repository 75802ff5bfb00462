// Opens pages from disk: {pages, widths, themes, pictures?, axe?} -> what was found on each.
import { basename } from "node:path";
import { pathToFileURL } from "node:url";
import { accessibility, answer, asked, boxes, opened } from "./browser.mjs";

const results = [];
for (const file of asked.pages) {
  for (const theme of asked.themes) {
    const { browser, context, noted } = await opened({ colorScheme: theme });
    const page = await context.newPage();
    const found = [];
    const cut = [];
    for (const width of asked.widths) {
      await page.setViewportSize({ width, height: 900 });
      await page.goto(pathToFileURL(file).href);
      await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
      found.push(...(await boxes(page)).map((one) => `${width} px ${one}`));
      const scrolled = await page.evaluate(() => [...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.getAttribute("aria-label")));
      cut.push(...scrolled.map((name) => `${width} px ${name}`));
      if (asked.pictures) await page.screenshot({ path: `${asked.pictures}/${basename(file, ".html")}-${theme}-${width}.png`, fullPage: true });
    }
    const paint = await page.evaluate(() => new Promise((resolve) => {
      const ask = (list) => list.getEntriesByName("first-contentful-paint").forEach((entry) => resolve(entry.startTime));
      new PerformanceObserver(ask).observe({ type: "paint", buffered: true });
    }));
    const facts = await page.evaluate(() => ({
      title: document.querySelector("h1").textContent,
      text: document.getElementById("page").innerText,
      raw: document.getElementById("page").textContent,
      foreign: [...document.querySelectorAll("img, iframe, object, embed, a, form, link, base, video, math, style:not(head style), #page script")].map((one) => one.outerHTML.slice(0, 80)),
      hit: globalThis.hit ?? null,
      theme: document.documentElement.dataset.theme,
    }));
    await page.emulateMedia({ media: "print" });
    found.push(...(await boxes(page)).map((one) => `print ${one}`));
    const printed = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await page.emulateMedia({ media: "screen" });
    const head = page.locator("th button").first();
    if (await head.count()) await head.press("Enter");
    const sorted = await page.evaluate(() => document.querySelector("th[aria-sort]")?.getAttribute("aria-sort") ?? null);
    for (const head of await page.$$("th button")) await head.evaluate((one) => one.click());
    for (const summary of await page.$$("summary")) await summary.evaluate((one) => one.click());
    await page.waitForTimeout(50);
    if (asked.axe !== false) found.push(...(await accessibility(page)).map((one) => `axe ${one}`));
    results.push({ file, theme, found, cut, paint, printed, sorted, ...facts, errors: noted.errors, requests: noted.requests.filter((url) => !url.startsWith("file:")) });
    await browser.close();
  }
}
answer(results);
