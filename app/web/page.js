() => {
  // What the page does beyond Gradio: keys, focus, names and spoken status. Gradio runs this when the page opens.
  const find = (selector) => document.querySelector(selector);
  const roll = () => find('#player .roll');
  const within = (target, ...names) => target instanceof Element && target.closest(names.map((name) => `#${name}`).join());

  // Space plays or pauses, and never makes a new piece in place of the one that is heard. Enter presses the button.
  for (const kind of ['keydown', 'keyup']) {
    document.addEventListener(kind, (event) => {
      if (event.key !== ' ' || !within(event.target, 'generate', 'extend')) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      if (kind === 'keydown' && !event.repeat) find('#player .play').click();
    }, true);
  }
  const calm = window.matchMedia('(prefers-reduced-motion: reduce)');
  document.addEventListener('click', (event) => {
    if (within(event.target, 'generate', 'extend')) {
      find('#player').scrollIntoView(
        { block: window.innerWidth < 900 ? 'start' : 'nearest', behavior: calm.matches ? 'auto' : 'smooth' });
      // A click with the mouse leads on to the music; with the keyboard one may want the next button.
      if (event.detail) roll().focus({ preventScroll: true });
    }
    // The player sends the take along: the server may have been restarted.
    if (within(event.target, 'extend')) find('#player .player').dispatchEvent(new CustomEvent('extend'));
    if (within(event.target, 'stop')) roll().focus({ preventScroll: true }); // the button is about to be disabled
  });

  // Gradio opens the list of choices on any key, also on the Tab that leaves it.
  const example = find('#example');
  const closeLeft = () => {
    const box = example.querySelector('[aria-expanded="true"]');
    if (box && box !== document.activeElement) box.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true }));
  };
  new MutationObserver(closeLeft).observe(example, { subtree: true, attributeFilter: ['aria-expanded'] });
  example.addEventListener('focusout', () => setTimeout(closeLeft, 50));

  // Screen readers hear each new sentence, and of one that only counts on, the latest every 20 seconds.
  const live = document.createElement('div');
  live.id = 'spoken-status';
  live.setAttribute('role', 'status');
  document.body.append(live);
  const pattern = (text) => text.replace(/\d[\d:.,]*/g, '0');
  let said = '', saidAt = -Infinity, later = 0;
  const say = () => {
    const text = (find('#status .md')?.firstElementChild?.firstChild?.textContent ?? '').trim();
    clearTimeout(later);
    const wait = saidAt + 20000 - performance.now();
    if (!text || text === said) return;
    if (pattern(text) === pattern(said) && wait > 0) { later = setTimeout(say, wait); return; }
    [said, saidAt] = [text, performance.now()];
    live.textContent = text;
  };
  new MutationObserver(say).observe(find('#status'), { childList: true, subtree: true, characterData: true });

  // Gradio gives all these buttons one name, and the place for files one that is not what it shows.
  const rename = () => {
    for (const button of document.querySelectorAll('.reset-button')) {
      const slider = button.closest('.block').querySelector('[data-testid="block-info"]').textContent.trim();
      if (button.dataset.resets === slider) continue;
      button.dataset.resets = slider;
      button.setAttribute('aria-label', `Reset ${slider}`);
    }
    find('#file .upload-container')?.removeAttribute('aria-label');
  };
  rename();
  new MutationObserver(rename).observe(find('#settings'), { childList: true, subtree: true, characterData: true }); // some are drawn when opened, and all translated

  // The model card is English in all languages; it is drawn when opened.
  const mark = () => { for (const card of document.querySelectorAll('#about .prose')) card.lang = 'en'; };
  new MutationObserver(mark).observe(find('#about'), { childList: true, subtree: true });

  // Music is kept in the browser. Where that is not allowed it lives as long as its tab: ask before it is lost.
  window.addEventListener('beforeunload', (event) => {
    const { notes, take, stored } = find('#player .player').dataset;
    if (notes !== '0' && take !== 'prompt' && stored !== 'true') event.preventDefault();
  });
}
