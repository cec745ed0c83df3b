// Inspects files beside the page, so that nothing in a file can stop the page itself.

import { inspect } from "./inspect.js";

addEventListener("message", async ({ data }) => {
  try {
    postMessage({ answers: await inspect(data) });
  } catch (error) {
    postMessage({ bug: String(error?.stack ?? error) });
  }
});
