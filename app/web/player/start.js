// Where it begins: the browser runs this as `js_on_load` of a gr.HTML.

import { Language } from './language.js';
import { Player } from './player.js';

/** @type {{element: HTMLElement, props: {value: import('./music.js').Value}, trigger: (name: string, data: object) => void, watch: (name: string, changed: () => void) => void}} */
// @ts-ignore: `gradio` stands for the names that Gradio puts into scope
const { element, props, trigger, watch } = gradio;

const root = /** @type {HTMLElement} */ (element.querySelector('.player'));
const player = new Player(root, trigger, new Language(root.dataset.languages ?? ''));
watch('value', () => player.receive(props.value));
player.receive(props.value);
