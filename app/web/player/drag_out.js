// Take a piece out of the page: click to save it, or drag it into a music program or a folder.

/**
 * @param {HTMLAnchorElement} link
 * @param {() => {name: string, content: Uint8Array<ArrayBuffer>}} file made when it is asked for
 */
export function dragOut(link, file) {
  const refresh = () => {
    const { name, content } = file();
    if (link.href.startsWith('blob:')) URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(new File([content], name, { type: 'audio/midi' }));
    link.download = name;
  };
  link.href = '#';
  link.addEventListener('click', refresh);
  link.addEventListener('dragstart', (event) => {
    refresh();
    event.dataTransfer?.setData('DownloadURL', `audio/midi:${link.download}:${link.href}`);
    event.dataTransfer?.setData('text/uri-list', link.href);
  });
}
