// How the site's search orders what it finds. The numbers are Sphinx's own: it takes all of them from here, or none.
var Scorer = {
  // kdloss.kdrl_loss comes before kdloss.integrations.slime.kdrl_loss.
  score: ([docname, title, anchor, descr, score]) => score + (/^kdloss\.\w+$/.test(title) ? 1 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
