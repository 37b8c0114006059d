// Where in the model a composition acts, as a heat map.
import { computed, reactive } from "./vue.js";
import { ApiError, post } from "./api.js";
import { CompositionField, number } from "./parts.js";

// Two digits also where the second is 0: columns are compared.
const cell = (value) => (value >= 0.001 && value < 99.5 ? value.toPrecision(2) : number(value, 2));

export function makeLayers() {
  const state = reactive({ model: "", busy: false, report: null, shown: "", error: "" });
  let leaving = null;

  state.run = async (prepare = false) => {
    leaving?.abort();
    const mine = (leaving = new AbortController());
    Object.assign(state, { busy: true, error: "", report: null });
    try {
      const report = await post("v1/layers", { model: state.model, prepare }, mine.signal);
      state.report = report;
      state.shown = report.total ? "" : (report.adapters[0]?.adapter ?? "");
    } catch (error) {
      if (mine === leaving && error.name !== "AbortError") {
        state.error = error instanceof ApiError ? error.message : String(error);
      }
    } finally {
      if (mine === leaving) state.busy = false;
    }
  };
  return state;
}

export const Layers = {
  template: "#layers",
  components: { CompositionField },
  props: { state: Object, about: Object, names: Array },
  setup(props) {
    const report = computed(() => props.state.report);
    const choices = computed(() => {
      const r = report.value;
      if (!r) return [];
      const said = (a) => `${a.by_module ? "mean weight" : "weight"} ${number(a.weight)}`;
      const parts = r.adapters.map((a) => ({ value: a.adapter, label: `${a.adapter}, ${said(a)}` }));
      return [...(r.total ? [{ value: "", label: "the whole composition" }] : []), ...parts];
    });
    const table = computed(() => {
      const r = report.value;
      return r && (props.state.shown === "" ? r.total : r.adapters.find((a) => a.adapter === props.state.shown)?.norms);
    });
    // one scale for all tables of a composition, so that they can be compared
    const top = computed(() => {
      const tables = [report.value?.total || [], ...(report.value?.adapters || []).map((a) => a.norms)];
      return tables.flat(2).reduce((most, value) => Math.max(most, value ?? 0), 0);
    });
    const rows = computed(() =>
      (table.value || []).map((row, i) => ({
        layer: report.value.layers[i],
        cells: row.map((value, j) => ({
          text: value === null ? "" : cell(value),
          title: `layer ${report.value.layers[i]}, ${report.value.projections[j]}: ${value === null ? "no module" : number(value, 4)}`,
          style: { "--heat": `${value === null || !top.value ? 0 : Math.round((100 * value) / top.value)}%` },
          none: value === null,
        })),
      })),
    );
    const short = (projection) => projection.replace(/_proj$/, "");
    return { report, choices, rows, top, short, number };
  },
};
