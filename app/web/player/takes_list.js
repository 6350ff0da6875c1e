// The list of takes beside the timeline.

import { clock, Score, unpack } from './notes.js';
import { drawNotes, prepare } from './roll.js';

/** @typedef {import('./roll.js').Colors} Colors */
/** @typedef {{id: string, title: string, detail: string, hint: string, score: Score, until: number, join: number, starred: boolean, kept: boolean, made: boolean}} Row */
/** `kept`: whether it can be starred and deleted. `made`: whether it can be made again. */

/** @param {import('./takes.js').Take} take @returns {Row} */
export function rowOf(take) {
  const made = take.kind === 'made';
  const time = new Date(take.made).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' });
  return {
    id: take.id, score: new Score(unpack(take.notes)), until: take.until, join: take.join, starred: take.starred, kept: true, made,
    title: made ? `Seed ${take.seed}` : take.kind === 'duet' ? `Duet at ${time}` : `Played at ${time}`,
    detail: made && take.latents ? `${clock(take.until)} · ${take.latents.toLocaleString('en')} latents` : clock(take.until),
    hint: made ? `Generated at ${time}` : '',
  };
}

export class TakesList {
  /** @type {Map<string, {row: Row, element: HTMLElement}>} */
  #rows = new Map();

  /**
   * @param {HTMLElement} element
   * @param {{choose: (id: string) => void, star: (id: string) => void, remove: (id: string) => void, again: (id: string) => void}} on
   */
  constructor(element, on) {
    this.element = element;
    this.on = on;
    element.addEventListener('keydown', (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key], radios = [...element.querySelectorAll('[role=radio]')];
      const at = radios.indexOf(/** @type {Element} */ (event.target));
      if (!step || at < 0) return;
      event.preventDefault();
      event.stopPropagation();
      const next = /** @type {HTMLElement | undefined} */ (radios[at + step]);
      next?.focus();
      next?.click();
    });
  }

  /** @param {Row[]} rows @param {string} chosen @param {() => Colors} colors */
  show(rows, chosen, colors) {
    for (const [id, { element }] of this.#rows) if (!rows.some((row) => row.id === id)) { element.remove(); this.#rows.delete(id); }
    rows.forEach((row, place) => {
      const known = this.#rows.get(row.id), element = known?.element ?? this.#build(row.id);
      if (this.element.children[place] !== element) this.element.insertBefore(element, this.element.children[place] ?? null);
      this.#fill(element, row, row.id === chosen);
      if (known?.row !== row) this.#draw(element, row, colors());
      this.#rows.set(row.id, { row, element });
    });
    this.element.hidden = !rows.length;
  }

  /** Draw all rolls anew. @param {Colors} ink */
  redraw(ink) { for (const { row, element } of this.#rows.values()) this.#draw(element, row, ink); }

  /** @param {string} id */
  #build(id) {
    const element = document.createElement('div');
    element.className = 'take';
    element.innerHTML = '<button type="button" role="radio" class="choose"><span class="title"></span><span class="detail"></span>'
      + '<canvas aria-hidden="true"></canvas></button><button type="button" class="small star">☆</button>'
      + '<button type="button" class="small again">↻</button><button type="button" class="small remove">✕</button>';
    for (const name of /** @type {const} */ (['choose', 'star', 'again', 'remove']))
      button(element, name).addEventListener('click', () => this.on[name](id));
    return element;
  }

  /** @param {HTMLElement} element @param {Row} row @param {boolean} chosen */
  #fill(element, row, chosen) {
    const choose = button(element, 'choose');
    choose.setAttribute('aria-checked', String(chosen));
    choose.tabIndex = chosen ? 0 : -1; // arrow keys reach the others, as in any radio group
    choose.children[0].textContent = row.title;
    choose.children[1].textContent = row.detail;
    choose.title = row.hint;
    const take = `${row.title}, ${row.detail}`;
    const labels = /** @type {const} */ ([
      ['star', ...(row.starred ? ['Remove the star', `Remove the star from ${take}`] : ['Star', `Star ${take}`])],
      ['again', 'Make again with another seed', `Make again with another seed: ${take}`], ['remove', 'Delete', `Delete ${take}`],
    ]);
    for (const [name, short, whole] of labels) {
      button(element, name).hidden = name === 'again' ? !(row.kept && row.made) : !row.kept;
      button(element, name).title = short;
      button(element, name).setAttribute('aria-label', whole);
    }
    const star = button(element, 'star');
    star.textContent = row.starred ? '★' : '☆';
    star.setAttribute('aria-pressed', String(row.starred));
  }

  /** @param {HTMLElement} element @param {Row} row @param {Colors} ink */
  #draw(element, row, ink) {
    const { pen, width, height } = prepare(/** @type {HTMLCanvasElement} */ (element.querySelector('canvas')));
    if (!width) return;
    drawNotes(pen, row.score, { from: 0, span: Math.max(1, row.until), width, height, range: row.score.range() }, (note) =>
      note.on < row.join - 0.005 ? ink.prompt : ink.generated);
  }
}

/** @param {HTMLElement} element @param {string} name */
const button = (element, name) => /** @type {HTMLButtonElement} */ (element.querySelector(`.${name}`));
