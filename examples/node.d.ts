// What receipts.ts uses of Node.js, for a compiler without @types/node.
declare module "node:fs" {
  export function readFileSync(path: string, encoding: string): string;
}
declare module "node:crypto" {
  interface Hash {
    update(data: string | Uint8Array): Hash;
    digest(): { readUInt32BE(offset: number): number };
    digest(encoding: string): string;
  }
  export function createHash(name: string): Hash;
}
declare module "node:url" {
  export function fileURLToPath(url: string): string;
}
interface ImportMeta {
  url: string;
}
declare const process: { argv: string[] };
declare const Buffer: {
  byteLength(text: string): number;
  from(text: string, encoding: string): { length: number; readUInt16LE(offset: number): number };
};
