// Inspects files beside the page, so that nothing in a file can stop the page itself.

import { inspect } from "./inspect.js";

addEventListener("message", async ({ data: { number, dropped } }) => {
  try {
    postMessage({ number, answers: await inspect(dropped) });
  } catch (error) {
    postMessage({ number, bug: error instanceof Error ? `${error}\n${error.stack}` : String(error) });
  }
});
