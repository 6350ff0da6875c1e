// What was played and generated, kept in the browser so that it survives a reload and a lost connection.

/**
 * @typedef {{
 *   id: string, kind: 'made' | 'played' | 'duet', made: number, notes: string, pedals: [number, number][],
 *   join: number, until: number, seed: number | null, latents: number, settings: string, starred: boolean,
 *   turns: {from: number, to: number}[], keys?: string,
 * }} Take
 * `made`: time of day in ms. `notes`: packed. `join`: where its prompt ends. `settings`: as in a link. `turns`: what a
 * human played of a duet; a piece has its prompt instead. `keys`: notes as
 * their keys were held, to be written with the pedal.
 */

const MOST_TAKES = 200;

/**
 * The takes to drop so that at most `most` are left: the oldest without a star.
 * @param {Take[]} takes @param {number} [most]
 */
export function surplus(takes, most = MOST_TAKES) {
  const plain = takes.filter((take) => !take.starred).sort((a, b) => a.made - b.made);
  return plain.slice(0, Math.max(0, takes.length - most));
}

/** The takes of this browser. Without storage, as in some private windows, they last as long as the page. */
export class Takes {
  /** @type {Map<string, Take>} */
  all = new Map();
  /** Whether they survive a reload. */
  stored = false;
  /** @type {IDBDatabase | null} */
  #database = null;

  /** Read what is stored. */
  async open() {
    try {
      const opening = indexedDB.open('music-ar', 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore('takes', { keyPath: 'id' });
      this.#database = await answer(opening);
      const found = await answer(this.#database.transaction('takes').objectStore('takes').getAll());
      for (const take of found) if (!this.all.has(take.id)) this.all.set(take.id, take);
      this.stored = true;
    } catch {
      this.#database = null;
    }
  }

  /** All, the newest first. */
  list() { return [...this.all.values()].sort((a, b) => b.made - a.made); }

  /** Keep a take, in place of an earlier state of it. @param {Take} take */
  keep(take) {
    this.all.set(take.id, take);
    this.#change((store) => store.put(take));
    for (const old of surplus([...this.all.values()])) this.remove(old.id);
  }

  /** @param {string} id */
  remove(id) {
    this.all.delete(id);
    this.#change((store) => store.delete(id));
  }

  /** @param {(store: IDBObjectStore) => IDBRequest} change */
  #change(change) {
    if (!this.#database) return;
    try {
      const changing = this.#database.transaction('takes', 'readwrite');
      change(changing.objectStore('takes'));
      changing.onabort = () => { this.stored = false; }; // for one thing, when the disk is full
    } catch {
      this.stored = false;
    }
  }
}

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
function answer(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
