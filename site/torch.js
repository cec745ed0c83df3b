// Reading heads of what torch.save writes: names, types and shapes of tensors. A pickle is a program; here no part of
// one is run. Its few instructions for plain data and tensors are followed, and everything else is an opaque thing.
//
// Format: CPython's Lib/pickletools.py, and torch 2.13 (torch/serialization.py, torch/_utils.py).

import tables from "./tables.js";
import { Unreadable, checkName, isSizes } from "./reading.js";

/** @typedef {import("./reading.js").Head} Head @typedef {import("./reading.js").Tensor} Tensor */

const STORAGES = /** @type {Record<string, string>} */ ({
  FloatStorage: "F32", HalfStorage: "F16", BFloat16Storage: "BF16", DoubleStorage: "F64", LongStorage: "I64",
  IntStorage: "I32", ShortStorage: "I16", CharStorage: "I8", ByteStorage: "U8", BoolStorage: "BOOL",
});
const MOST_BYTES = 64 << 20;
const TEXT = new TextDecoder("utf-8", { fatal: true });
const damaged = (why) => new Unreadable("bad-torch-file", `This file of torch.save cannot be read: ${why}.`,
  "Use regraft inspect, or save it as safetensors.");

/** Whether a file begins as a zip archive does. @param {File} file */
export async function isZip(file) {
  const start = new Uint8Array(await file.slice(0, 4).arrayBuffer());
  return String.fromCharCode(...start) === "PK\x03\x04";
}

/**
 * The tensors of a file; those of the dict `inside`, or `model`, where the file has dicts.
 * @param {File} file @returns {Promise<Head>}
 */
export async function readTorch(file) {
  const text = await pickleIn(file);
  const loaded = new Reader(text).load();
  const tensors = tensorsIn(loaded) ?? (loaded instanceof Map ? tensorsIn(loaded.get("model")) : null);
  if (tensors === null) {
    throw new Unreadable("not-tensors", "This file of torch.save holds no dict of tensors.",
      "Give the file with the adapter's weights.");
  }
  return { tensors, metadata: {}, dataStart: 0, size: file.size };
}

/** @returns {Map<string, Tensor> | null} */
function tensorsIn(value) {
  if (!(value instanceof Map)) return null;
  const found = [...value].filter(([name, each]) => typeof name === "string" && each?.shape);
  for (const [name] of found) checkName(name);
  return found.length || !value.size ? new Map(found) : null;
}

/** The pickle of an archive. @param {File} file */
async function pickleIn(file) {
  const bytes = async (start, end) => new DataView(await file.slice(start, end).arrayBuffer());
  const tail = await bytes(Math.max(file.size - 65557, 0), file.size);
  let end = tail.byteLength - 22;
  while (end >= 0 && tail.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw damaged("its directory is missing, so it is cut off");
  const size = tail.getUint32(end + 12, true), start = tail.getUint32(end + 16, true);
  if (start === 0xffffffff) throw damaged("it is too large for this page");
  const list = await bytes(start, start + size);
  for (let at = 0; at + 46 <= list.byteLength && list.getUint32(at, true) === 0x02014b50;) {
    const length = list.getUint16(at + 28, true);
    const name = new TextDecoder().decode(new Uint8Array(list.buffer, at + 46, Math.min(length, list.byteLength - at - 46)));
    if (name === "data.pkl" || name.endsWith("/data.pkl")) {
      const place = list.getUint32(at + 42, true), content = list.getUint32(at + 24, true);
      if (list.getUint16(at + 10, true) !== 0 || content > MOST_BYTES) throw damaged("its pickle is compressed or too large");
      const local = await bytes(place, place + 30);
      const from = place + 30 + local.getUint16(26, true) + local.getUint16(28, true);
      return bytes(from, from + content);
    }
    at += 46 + length + list.getUint16(at + 30, true) + list.getUint16(at + 32, true);
  }
  throw damaged("there is no pickle in it");
}

/** What a pickle makes, without making it. */
class Reader {
  /** @param {DataView} view */
  constructor(view) {
    this.view = view;
    this.at = 0;
    /** @type {any[]} */ this.stack = [];
    /** @type {any[][]} */ this.marked = [];
    /** @type {Map<number, any>} */ this.memo = new Map();
  }

  /** @returns {any} */
  load() {
    try {
      for (;;) {
        const code = this.byte();
        if (code === 0x2e) return this.stack.pop();
        this.step(code);
      }
    } catch (error) {
      if (error instanceof RangeError || error instanceof TypeError) throw damaged("its pickle is damaged");
      throw error;
    }
  }

  byte() { return this.view.getUint8(this.at++); }
  int() { this.at += 4; return this.view.getInt32(this.at - 4, true); }

  text(length) {
    this.at += length;
    return TEXT.decode(new Uint8Array(this.view.buffer, this.view.byteOffset + this.at - length, length));
  }

  line() {
    const start = this.at;
    while (this.byte() !== 10);
    return new TextDecoder().decode(new Uint8Array(this.view.buffer, this.view.byteOffset + start, this.at - start - 1));
  }

  items() {
    const found = this.stack;
    this.stack = /** @type {any[]} */ (this.marked.pop());
    return found;
  }

  /** @param {number} count */
  pop(count) { return this.stack.splice(this.stack.length - count, count); }

  /** @param {any[]} pairs */
  put(pairs) {
    const target = this.stack[this.stack.length - 1];
    for (let i = 0; i + 1 < pairs.length; i += 2) if (target instanceof Map) target.set(pairs[i], pairs[i + 1]);
  }

  /** @param {any[]} values */
  append(values) {
    const target = this.stack[this.stack.length - 1];
    if (Array.isArray(target)) target.push(...values);
  }

  /** @param {number} code */
  step(code) {
    const { stack } = this;
    switch (String.fromCharCode(code)) {
      case "\x80": this.byte(); break;
      case "\x95": this.at += 8; break;
      case "(": this.marked.push(stack); this.stack = []; break;
      case "0": stack.pop(); break;
      case "}": stack.push(new Map()); break;
      case "]": stack.push([]); break;
      case ")": stack.push([]); break;
      case "t": case "l": { const found = this.items(); this.stack.push(found); break; }
      case "d": { const found = this.items(); this.stack.push(new Map()); this.put(found); break; }
      case "\x85": stack.push(this.pop(1)); break;
      case "\x86": stack.push(this.pop(2)); break;
      case "\x87": stack.push(this.pop(3)); break;
      case "q": this.memo.set(this.byte(), stack.at(-1)); break;
      case "r": this.memo.set(this.int(), stack.at(-1)); break;
      case "\x94": this.memo.set(this.memo.size, stack.at(-1)); break;
      case "h": stack.push(this.memo.get(this.byte())); break;
      case "j": stack.push(this.memo.get(this.int())); break;
      case "X": stack.push(this.text(this.int())); break;
      case "\x8c": case "U": stack.push(this.text(this.byte())); break;
      case "T": case "B": stack.push(this.text(this.int())); break;
      case "C": stack.push(this.text(this.byte())); break;
      case "J": stack.push(this.int()); break;
      case "K": stack.push(this.byte()); break;
      case "M": this.at += 2; stack.push(this.view.getUint16(this.at - 2, true)); break;
      case "\x8a": stack.push(this.long(this.byte())); break;
      case "G": this.at += 8; stack.push(this.view.getFloat64(this.at - 8)); break;
      case "N": stack.push(null); break;
      case "\x88": stack.push(true); break;
      case "\x89": stack.push(false); break;
      case "c": stack.push({ global: `${this.line()}.${this.line()}` }); break;
      case "\x93": { const [module, name] = this.pop(2); stack.push({ global: `${module}.${name}` }); break; }
      case "Q": { const [id] = this.pop(1); stack.push({ storage: id }); break; }
      case "R": case "\x81": { const [called, given] = this.pop(2); stack.push(outlineOf(called, given)); break; }
      case "b": { const [state] = this.pop(1); void state; break; }
      case "s": this.put(this.pop(2)); break;
      case "u": { const found = this.items(); this.put(found); break; }
      case "a": this.append(this.pop(1)); break;
      case "e": { const found = this.items(); this.append(found); break; }
      default: throw damaged("its pickle has an instruction that no plain data needs");
    }
  }

  /** A whole number of some bytes. @param {number} length */
  long(length) {
    let value = 0;
    for (let i = 0; i < length; i++) value += this.byte() * 256 ** i;
    return value;
  }
}

/** What a call gives: a tensor's outline, an empty dict, or something opaque. */
function outlineOf(called, given) {
  switch (called?.global) {
    case "torch._utils._rebuild_tensor_v2": {
      const [{ storage }, , shape] = given;
      const dtype = STORAGES[storage?.[1]?.global?.split(".").at(-1)];
      if (!dtype) return { opaque: true };
      if (!isSizes(shape)) {
        throw new Unreadable("not-tensors", "It holds a tensor whose shape is none.", "Save the file again.");
      }
      const count = shape.reduce((x, y) => x * y, 1);
      return { dtype, shape, bytes: (count * tables.header.dtypes[dtype][0]) / 8 };
    }
    case "torch._utils._rebuild_parameter": return given[0];
    case "collections.OrderedDict": return new Map();
    default: return { opaque: true };
  }
}
