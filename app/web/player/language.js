// The language of the page. Its texts and those of the server are English; here they are shown in the user's language as
// they come. Gradio's own tables (gr.I18n) know no numbers in sentences and no choice in the page.

import { Words } from './words.js';

const LANGUAGES = ['en', 'de', 'fr', 'es', 'ja'];
const KEY = 'music-ar-language';
const ATTRIBUTES = ['title', 'aria-label', 'aria-valuetext', 'placeholder'];
const NOT_WORDS = 'script, style, [translate=no], [translate=no] *';

/**
 * What the user chose before, or the first of the browser's languages that the page speaks.
 * @param {readonly string[]} wanted @param {string | null} chosen
 */
export function preferred(wanted, chosen) {
  const known = [chosen ?? '', ...wanted].map((each) => each.toLowerCase().split('-')[0]);
  return known.find((each) => LANGUAGES.includes(each)) ?? 'en';
}

export class Language {
  /** @type {Words | null} null for English */
  #words = null;
  /** @type {WeakMap<Node, Record<string, {english: string, shown: string}>>} what was translated: the text, or attributes by name */
  #done = new WeakMap();
  /** @type {(() => void)[]} called when another language is chosen */
  listeners = [];

  /** @param {string} tables address of the folder of the tables */
  constructor(tables) {
    this.tables = tables;
    const select = /** @type {HTMLSelectElement} */ (document.querySelector('#language'));
    const chosen = preferred(navigator.languages, kept());
    select.value = chosen;
    select.addEventListener('change', () => { keep(select.value); this.choose(select.value); });
    new MutationObserver((changes) => this.#follow(changes)).observe(document.body, {
      subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ATTRIBUTES,
    });
    if (chosen !== 'en') this.choose(chosen);
  }

  /** @param {string} language */
  async choose(language) {
    this.#words = language === 'en' ? null : new Words(await (await fetch(`${this.tables}${language}.json`)).json(), language === 'ja' ? '' : ' ');
    document.documentElement.lang = language;
    this.#translateAll(document.body);
    for (const listener of this.listeners) listener();
  }

  /** @param {string} english */
  translate(english) { return this.#words?.translate(english) ?? english; }

  /** @param {MutationRecord[]} changes */
  #follow(changes) {
    for (const { type, target, attributeName, addedNodes } of changes) {
      if (type === 'attributes') this.#translateAttribute(/** @type {Element} */ (target), attributeName ?? '');
      else if (type === 'characterData') this.#translateText(/** @type {Text} */ (target));
      else addedNodes.forEach((node) => this.#translateAll(node));
    }
  }

  /** @param {Node} root */
  #translateAll(root) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
    for (let node = /** @type {Node | null} */ (root); node; node = walker.nextNode()) {
      if (node instanceof Text) this.#translateText(node);
      else if (node instanceof Element) {
        for (const name of ATTRIBUTES) this.#translateAttribute(node, name);
        if (node instanceof HTMLInputElement && node.getAttribute('role') === 'combobox') this.#translateChoice(node);
      }
    }
  }

  /** @param {Text} node */
  #translateText(node) {
    if (!node.parentElement || node.parentElement.matches(NOT_WORDS)) return;
    const shown = this.#shown(node, 'text', node.data);
    if (node.data !== shown) node.data = shown;
  }

  /** @param {Element} element @param {string} name */
  #translateAttribute(element, name) {
    const value = element.getAttribute(name);
    if (value === null || element.matches(NOT_WORDS)) return;
    const shown = this.#shown(element, name, value);
    if (value !== shown) element.setAttribute(name, shown);
  }

  /** What to show in place of a text, which may be what was shown before. @param {Node} node @param {string} name @param {string} text */
  #shown(node, name, text) {
    const all = this.#done.get(node), before = all?.[name];
    const english = before?.shown === text ? before.english : text, shown = this.translate(english);
    if (shown !== english) this.#done.set(node, { ...all, [name]: { english, shown } });
    return shown;
  }

  /** Gradio shows what was chosen in a list as the value of an input: show it translated, and let Gradio read it in English. @param {HTMLInputElement} input */
  #translateChoice(input) {
    const native = /** @type {PropertyDescriptor & {get: () => string, set: (value: string) => void}} */ (
      Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value'));
    if (!Object.hasOwn(input, 'value')) {
      let english = input.value, shown = english;
      const show = () => { shown = this.translate(english); native.set.call(input, shown); };
      Object.defineProperty(input, 'value', {
        get: () => { const now = native.get.call(input); return now === shown ? english : now; },
        set: (value) => { english = value; show(); },
      });
      this.listeners.push(() => { if (native.get.call(input) === shown) show(); });
    }
    input.value = input.value;
  }
}

/** @returns {string | null} */
function kept() {
  try { return localStorage.getItem(KEY); } catch { return null; }
}

/** @param {string} language */
function keep(language) {
  try { localStorage.setItem(KEY, language); } catch { /* it counts until the page is left */ }
}
