// Sentences of the page and the server in another language. Nothing here touches the page, so that Node can test it.

const [NUMBER, NAME, TEXT] = ['([^\\p{L}]*?[^\\p{L}.])', '([^”]+)', '((?:(?!\\. ).)+?)']; // a text is one sentence at most

/**
 * A table of sentences, keyed by the English ones. `{1}` to `{9}` stand for numbers and other texts without letters, `{a}` to
 * `{z}` for any text, which is translated itself unless it is in quotes: there it is a name.
 */
export class Words {
  /** @type {Map<string, string>} */
  #fixed = new Map();
  /** @type {{pattern: RegExp, holes: string[], names: string, other: string, letters: number}[]} the most specific first */
  #open = [];
  /** @type {Map<string, string>} translated lately */
  #known = new Map();

  /** @param {Record<string, string>} sentences @param {string} [between] sentences that follow each other */
  constructor(sentences, between = ' ') {
    this.between = between;
    for (const [english, other] of Object.entries(sentences)) {
      const holes = [...english.matchAll(/\{(\w)\}/g)].map(([, hole]) => hole), plain = english.replace(/\{\w\}/g, '');
      if (!holes.length) { this.#fixed.set(english, other); continue; }
      const names = [...english.matchAll(/“\{(\w)\}”/g)].map(([, hole]) => hole).join('');
      const matches = (/** @type {string} */ hole) => (/\d/.test(hole) ? NUMBER : names.includes(hole) ? NAME : TEXT);
      const pattern = english.split(/\{(\w)\}/).map((part, n) => (n % 2 ? matches(part) : escaped(part))).join('');
      this.#open.push({ pattern: new RegExp(`^${pattern}$`, 'su'), holes, names, other, letters: plain.length });
    }
    this.#open.sort((a, b) => b.letters - a.letters);
  }

  /** A text in this language; what the table lacks stays as it is. @param {string} text */
  translate(text) {
    if (!/\p{L}/u.test(text)) return text;
    const known = this.#known.get(text);
    if (known !== undefined) return known;
    const [, before, words, after] = /** @type {RegExpMatchArray} */ (text.match(/^(\s*)(.*?)(\s*)$/s));
    const translated = before + (this.#find(words, 0) ?? words) + after;
    if (this.#known.size > 500) this.#known.clear();
    this.#known.set(text, translated);
    return translated;
  }

  /** @param {string} text @param {number} depth @returns {string | undefined} undefined if the table lacks it */
  #find(text, depth) {
    if (depth > 5) return undefined;
    if (text.includes(' · ')) return text.split(' · ').map((part) => this.#find(part, depth + 1) ?? part).join(' · ');
    return this.#fixed.get(text) ?? this.#filled(text, depth) ?? this.#recased(text, depth) ?? this.#inParts(text, depth);
  }

  /** @param {string} text @param {number} depth */
  #filled(text, depth) {
    for (const { pattern, holes, names, other } of this.#open) {
      const found = text.match(pattern);
      if (!found) continue;
      const part = (/** @type {string} */ hole) => {
        const given = found[holes.indexOf(hole) + 1];
        return /\d/.test(hole) || names.includes(hole) ? given : this.#find(given, depth + 1) ?? given;
      };
      return other.replace(/\{(\w)\}/g, (_, hole) => part(hole));
    }
    return undefined;
  }

  /** Reasons stand alone with a capital letter, and labels within a sentence with a small one. @param {string} text @param {number} depth */
  #recased(text, depth) {
    const lower = text.charAt(0).toLowerCase() + text.slice(1);
    if (lower === text) return this.#fixed.get(capitalized(text));
    const found = this.#fixed.get(lower) ?? this.#filled(lower, depth);
    return found && capitalized(found);
  }

  /** Several sentences, or one whose full stop the table leaves out. @param {string} text @param {number} depth */
  #inParts(text, depth) {
    const parts = text.split(/(?<=\.) /);
    if (parts.length > 1) {
      const found = parts.map((part) => this.#find(part, depth + 1));
      return found.includes(undefined) ? undefined : found.join(this.between);
    }
    const found = text.endsWith('.') ? this.#find(text.slice(0, -1), depth + 1) : undefined;
    return found && `${found}${this.between ? '.' : '。'}`;
  }
}

/** @param {string} text */
const capitalized = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** @param {string} text */
const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
