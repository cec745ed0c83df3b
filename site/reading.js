// Reading heads of files: safetensors, GGUF, JSON. Tensors' numbers are left where they are, save single alphas.
//
// Formats: https://huggingface.co/docs/safetensors and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

import tables from "./tables.js";

const { most, dims, dtypes, formats, name: [LONGEST, PARTS] } = tables.header;

/**
 * @typedef {object} Tensor
 * @property {string} dtype the format's name of its type, such as `BF16`
 * @property {number[]} shape
 * @property {number} [start] where its bytes begin, from the start of the data
 * @property {number} bytes
 *
 * @typedef {object} Head
 * @property {Map<string, Tensor>} tensors
 * @property {Record<string, string>} metadata
 * @property {number} dataStart
 * @property {number} size of the file, in bytes
 */

/** Something that cannot be read, in words for its owner. */
export class Unreadable extends Error {
  /** @param {string} code regraft's name of the problem @param {string} message @param {string} [fix] */
  constructor(code, message, fix = "") {
    super(message);
    this.code = code;
    this.fix = fix;
  }
}

const AGAIN = "Download or save the file again.";

/** @param {Blob} file @param {number} start @param {number} end @returns {Promise<Uint8Array>} */
async function bytesOf(file, start, end) {
  try {
    return new Uint8Array(await file.slice(start, end).arrayBuffer());
  } catch {
    throw new Unreadable("unreadable-file", "The browser could not read the file.", "Drop it again.");
  }
}

/** What a file is by its first bytes, where it is no safetensors file. @param {Uint8Array} start */
function otherContent(start) {
  const text = String.fromCharCode(...start);
  if (text.startsWith("version https://git-lfs")) {
    return new Unreadable("lfs-pointer", "This is a Git LFS pointer and not the file itself.",
      "Run git lfs pull in the repository, or download the file.");
  }
  if (/^(?:ï»¿)?\s*<(?:!doctype html|html)/i.test(text)) {
    return new Unreadable("html-page", "This is a web page and not the file itself.",
      "Download it from its raw link, logged in if the repository is gated.");
  }
  if (text.startsWith("PK\x03\x04")) {
    return new Unreadable("zip-archive",
      "This is a zip archive, as torch.save writes. Pickles inside can run code, so this page does not open them.",
      "Use regraft inspect, which reads them without running anything, or save it as safetensors.");
  }
  const known = formats.find(([magic]) => text.startsWith(magic));
  return known ? new Unreadable("other-format", `This is ${known[1]}, which this page does not read.`) : null;
}

/** Read the head of a safetensors file and check it against the file's size. @param {File} file @returns {Promise<Head>} */
export async function readSafetensors(file) {
  const start = await bytesOf(file, 0, 512);
  if (start.length < 8) {
    throw new Unreadable("file-truncated",
      `The file has ${file.size} bytes, and a safetensors file has at least 10.`, AGAIN);
  }
  const length = Number(new DataView(start.buffer).getBigUint64(0, true));
  if (length > most || length > file.size - 8) {
    const other = otherContent(start);
    if (other) throw other;
    throw length > most
      ? new Unreadable("header-too-large",
        `The header's length is given as ${length} bytes, and the format allows ${most}. ` +
        "This is hardly a safetensors file.", AGAIN)
      : new Unreadable("file-truncated",
        `The header's length is given as ${length} bytes, and the file has ${file.size - 8} after that number. ` +
        "The file is cut off.", AGAIN);
  }
  const text = await bytesOf(file, 8, 8 + length);
  return checkedHead(parseHead(text), 8 + length, file.size);
}

/** @param {Uint8Array} text @returns {Record<string, any>} */
function parseHead(text) {
  let found;
  try {
    found = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text));
  } catch {
    throw new Unreadable("bad-header", "The header is no JSON text, so this is no safetensors file, or a damaged one.",
      AGAIN);
  }
  if (found === null || typeof found !== "object" || Array.isArray(found)) {
    throw new Unreadable("bad-header", "The header is no JSON object.", AGAIN);
  }
  return found;
}

/** @param {Record<string, any>} raw @param {number} dataStart @param {number} size @returns {Head} */
function checkedHead(raw, dataStart, size) {
  const { __metadata__: said, ...entries } = raw;
  const metadata = said ?? {};
  /** @type {Map<string, Tensor>} */
  const tensors = new Map();
  let end = 0;
  if (typeof metadata !== "object" || Object.values(metadata).some((value) => typeof value !== "string")) {
    throw new Unreadable("bad-header", "The header's metadata are not all text.", AGAIN);
  }
  for (const [name, entry] of Object.entries(entries)) {
    checkName(name);
    const shape = entry?.shape, offsets = entry?.data_offsets;
    const known = dtypes[entry?.dtype];
    const sound = known && isSizes(shape) && isSizes(offsets) && offsets.length === 2;
    const bytes = sound ? (shape.reduce((x, y) => x * y, 1) * known[0]) / 8 : -1;
    if (!sound || bytes !== offsets[1] - offsets[0]) {
      throw new Unreadable("bad-header", `The header's entry of ${name} is wrong: its type, shape and place do not ` +
        "fit together.", AGAIN);
    }
    end = Math.max(end, offsets[1]);
    tensors.set(name, { dtype: entry.dtype, shape, start: offsets[0], bytes });
  }
  if (dataStart + end > size) {
    throw new Unreadable("file-truncated",
      `The header names ${end} bytes of tensors, and the file has ${size - dataStart}. The file is cut off.`, AGAIN);
  }
  return { tensors, metadata, dataStart, size };
}

/** Complain of a tensor's name that no model has. @param {string} name */
export function checkName(name) {
  const why = name.length > LONGEST || name.split(".").length > PARTS
    ? `is longer than any model's: more than ${LONGEST} characters, or ${PARTS} parts`
    : /\0/.test(name) || !name.isWellFormed() ? "is not text" : "";
  if (why) throw new Unreadable("bad-name", `The tensor's name ${JSON.stringify(name.slice(0, 80))} ${why}.`, AGAIN);
}

/** Whether a value is a shape. @param {unknown} value */
export const isSizes = (value) => Array.isArray(value) && value.length <= dims && value.every((x) => Number.isSafeInteger(x) && x >= 0);

/** The first number of each of some tensors. @param {File} file @param {Head} head @param {Tensor[]} some */
export async function firstNumbers(file, head, some) {
  const found = [];
  for (const tensor of some) {
    const at = head.dataStart + (tensor.start ?? 0);
    const size = dtypes[tensor.dtype][0] / 8;
    found.push(numberOf(tensor.dtype, new DataView((await bytesOf(file, at, at + size)).buffer)));
  }
  return found;
}

/** @param {string} dtype @param {DataView} view @returns {number} */
function numberOf(dtype, view) {
  switch (dtype) {
    case "F32": return view.getFloat32(0, true);
    case "F64": return view.getFloat64(0, true);
    case "BF16": {
      const wide = new DataView(new ArrayBuffer(4));
      wide.setUint16(2, view.getUint16(0, true), true);
      return wide.getFloat32(0, true);
    }
    case "F16": return half(view.getUint16(0, true));
    case "I64": return Number(view.getBigInt64(0, true));
    case "U64": return Number(view.getBigUint64(0, true));
    case "I32": return view.getInt32(0, true);
    case "U32": return view.getUint32(0, true);
    case "I16": return view.getInt16(0, true);
    case "U16": return view.getUint16(0, true);
    case "I8": return view.getInt8(0);
    case "U8": case "BOOL": return view.getUint8(0);
    default: return NaN;
  }
}

/** A half-precision number from its bits. @param {number} bits */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 0x1f, rest = bits & 0x3ff;
  if (exponent === 0) return sign * rest * 2 ** -24;
  if (exponent === 31) return rest ? NaN : sign * Infinity;
  return sign * (1 + rest / 1024) * 2 ** (exponent - 15);
}

/** A JSON object in a file. @param {File} file @returns {Promise<Record<string, any>>} */
export async function readJson(file) {
  try {
    const found = JSON.parse(await file.text());
    if (found !== null && typeof found === "object" && !Array.isArray(found)) return found;
  } catch { /* said below */ }
  throw new Unreadable("bad-json", `${file.name} is no JSON object.`, "Use the file that was saved with these weights.");
}

// -- GGUF

const GGUF_TYPES = /** @type {Record<number, [string, number]>} */ ({
  0: ["F32", 32], 1: ["F16", 16], 28: ["F64", 64], 30: ["BF16", 16],
});
const MOST_GGUF_BYTES = 64 << 20;

/** Whether a file begins as GGUF does. @param {File} file */
export async function isGguf(file) {
  const start = await bytesOf(file, 0, 4);
  return String.fromCharCode(...start) === "GGUF";
}

/**
 * The fields and tensors of a GGUF file. Quantised tensors have the type `quantised`.
 * @param {File} file
 * @returns {Promise<{fields: Record<string, any>, tensors: Map<string, Tensor>, size: number}>}
 */
export async function readGguf(file) {
  const reader = new GgufReader(await bytesOf(file, 0, Math.min(file.size, MOST_GGUF_BYTES)));
  try {
    return { ...reader.head(), size: file.size };
  } catch (error) {
    if (error instanceof RangeError) {
      throw new Unreadable("bad-gguf", "The GGUF file's head is cut off or damaged.", AGAIN);
    }
    throw error;
  }
}

class GgufReader {
  /** @param {Uint8Array} bytes */
  constructor(bytes) {
    this.view = new DataView(bytes.buffer);
    this.at = 8;
  }

  /** @param {number} size */
  step(size) {
    this.at += size;
    return this.at - size;
  }

  int() { return this.view.getUint32(this.step(4), true); }
  long() { return Number(this.view.getBigUint64(this.step(8), true)); }

  text() {
    const length = this.long();
    if (length > this.view.byteLength) throw new RangeError("text");
    const start = this.step(length);
    return new TextDecoder().decode(new Uint8Array(this.view.buffer, start, length));
  }

  /** @param {number} type @returns {any} */
  value(type) {
    const view = this.view;
    switch (type) {
      case 0: case 7: return view.getUint8(this.step(1));
      case 1: return view.getInt8(this.step(1));
      case 2: return view.getUint16(this.step(2), true);
      case 3: return view.getInt16(this.step(2), true);
      case 4: return view.getUint32(this.step(4), true);
      case 5: return view.getInt32(this.step(4), true);
      case 6: return view.getFloat32(this.step(4), true);
      case 8: return this.text();
      case 9: {
        const inner = this.int(), count = this.long();
        return Array.from({ length: Math.min(count, view.byteLength) }, () => this.value(inner));
      }
      case 10: return this.long();
      case 11: return Number(view.getBigInt64(this.step(8), true));
      case 12: return view.getFloat64(this.step(8), true);
      default: throw new RangeError("type");
    }
  }

  head() {
    const count = this.long(), pairs = this.long();
    /** @type {Record<string, any>} */
    const fields = {};
    for (let n = 0; n < pairs; n++) {
      const name = this.text();
      fields[name] = this.value(this.int());
    }
    /** @type {Map<string, Tensor>} */
    const tensors = new Map();
    for (let n = 0; n < count; n++) {
      const name = this.text();
      const shape = Array.from({ length: this.int() }, () => this.long()).reverse();
      const [dtype, bits] = GGUF_TYPES[this.int()] ?? ["quantised", 32];
      const start = this.long();
      tensors.set(name, { dtype, shape, start, bytes: (shape.reduce((x, y) => x * y, 1) * bits) / 8 });
    }
    return { fields, tensors };
  }
}

/** The name that numpy has for a type, as `regraft inspect --json` prints it. @param {string} dtype */
export const numpyName = (dtype) => dtypes[dtype]?.[1] ?? "float32";
