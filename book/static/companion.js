// What scrolls sideways on its own can be reached, and scrolled, by the keyboard.
for (const box of document.querySelectorAll(".scroll, .pst-scrollable-table-container, div.cell_output, article figure, article pre"))
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
