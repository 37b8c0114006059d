// The page: what is shared by its three tabs, and how they are put together.
import { computed, createApp, nextTick, onMounted, reactive, ref } from "./vue.js";
import { ApiError, get, key, onKeyWanted } from "./api.js";
import { Lane, makeLane } from "./lane.js";
import { Layers, makeLayers } from "./layers.js";
import { quoted } from "./parts.js";

// Quasar's few icons, drawn; it would else want a font.
const ICONS = {
  arrow_drop_down: "M7 10l5 5 5-5z",
  error: "M12 2a10 10 0 1 0 0 20 10 10 0 0 0 0-20zm1 15h-2v-2h2zm0-4h-2V7h2z",
  cancel: "M12 2a10 10 0 1 0 0 20 10 10 0 0 0 0-20zm5 13.6L15.6 17 12 13.4 8.4 17 7 15.6 10.6 12 7 8.4 8.4 7l3.6 3.6L15.6 7 17 8.4 13.4 12z",
  keyboard_arrow_down: "M7.4 8.6 12 13.2l4.6-4.6L18 10l-6 6-6-6z",
  chevron_left: "M15.4 7.4 14 6l-6 6 6 6 1.4-1.4L10.8 12z",
  chevron_right: "M10 6 8.6 7.4l4.6 4.6-4.6 4.6L10 18l6-6z",
};

const app = createApp({
  components: { Lane, Layers },
  setup() {
    const about = ref({});
    const names = ref([]);
    const tab = ref("ask");
    const question = ref("");
    const settings = reactive({ template: "none", temperature: 0, tokens: 64, oneLine: false });
    const problem = ref("");
    const ready = ref(false);
    const door = reactive({ open: false, text: "", wrong: false, has: Boolean(key.get()) });
    const asking = makeLane("base");
    const pair = [makeLane("base"), makeLane("base")];
    const layers = makeLayers();

    const lanes = computed(() => (tab.value === "ask" ? [asking] : pair));
    const busy = computed(() => lanes.value.some((lane) => lane.busy));
    const templates = computed(() => [
      ...(about.value.chat ? [{ value: "chat", label: "a chat" }] : []),
      ...(about.value.templates || []).map((name) => ({
        value: name,
        label: { auto: "automatic: the form of the heaviest task", none: "as it is" }[name] || `the form of ${name}`,
      })),
    ]);

    onKeyWanted(() => {
      door.wrong = door.has;
      door.open = true;
    });

    async function load() {
      problem.value = "";
      try {
        const [said, models] = await Promise.all([get("v1/server"), get("v1/models")]);
        names.value = models.data.map((m) => m.id).filter((id) => id !== "auto" && id !== "base");
        if (!ready.value) {
          const [first, second] = [0, 1].map((i) => (names.value[i] ? quoted(names.value[i]) : "base"));
          settings.template = said.auto ? "auto" : said.chat ? "chat" : "none";
          settings.tokens = Math.min(settings.tokens, said.max_tokens);
          asking.model = said.auto ? "auto" : first;
          [pair[0].model, pair[1].model] = said.auto ? ["auto", "base"] : [first, second];
          layers.model = first;
        }
        about.value = said;
        ready.value = true;
      } catch (error) {
        if (!(error instanceof ApiError && error.status === 401)) problem.value = error.message;
      }
    }

    async function unlock() {
      key.set(door.text.trim());
      Object.assign(door, { text: "", open: false, wrong: false, has: Boolean(key.get()) });
      await load();
    }

    function forget() {
      key.set("");
      location.reload(); // with the key goes what it has shown: answers, examples
    }

    const number = (value, least, most, other) =>
      Number.isFinite(value) ? Math.min(most, Math.max(least, value)) : other;

    function send() {
      if (!question.value.trim() || !ready.value) return;
      settings.temperature = number(Number.parseFloat(String(settings.temperature).replace(",", ".")), 0, 2, 0);
      settings.tokens = number(Number.parseInt(settings.tokens, 10), 1, about.value.max_tokens, 64);
      for (const lane of lanes.value) lane.run(question.value, settings);
    }

    const stop = () => lanes.value.forEach((lane) => lane.stop());

    async function seeLayers(composition) {
      layers.model = composition;
      tab.value = "layers";
      await nextTick();
      layers.run();
    }

    onMounted(load);
    return {
      about, names, tab, question, settings, problem, ready, door, asking, pair, layers, busy, templates,
      load, unlock, forget, send, stop, seeLayers,
    };
  },
});

app.use(window.Quasar, { config: { dark: "auto", ripple: false } });
app.config.globalProperties.$q.iconMapFn = (name) => (ICONS[name] ? { icon: ICONS[name] } : undefined);
app.mount("#app");
