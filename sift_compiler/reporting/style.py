"""The look of a page: one style sheet, readable in light and dark and on paper."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5a6675;--line:#dfe4ea;--track:#eceff3;
--dense:#94a3b8;--sparse:#0d9488;--accent:#0f766e;--warn:#b45309;--wide:#0f766e;--parallel:#4f46e5;--factorized:#b4540a;--doped:#a21caf;
--low:#475569;--values:#0d9488;--gradients:#4f8fe0;--optimizer:#7c6fd6;--indices:#e0a030;--buffers:#94a3b8}
@media (prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2029;--ink:#e6eaf0;--soft:#9aa7b6;--line:#2c3440;--track:#262e39;
--dense:#64748b;--sparse:#2dd4bf;--accent:#5eead4;--warn:#fbbf24;--wide:#5eead4;--parallel:#a5b4fc;--factorized:#fdba74;--doped:#f0abfc;
--low:#cbd5e1;--values:#2dd4bf;--gradients:#7db1f0;--optimizer:#a79cf0;--indices:#f0c060;--buffers:#64748b}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1320px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}h2{font-size:19px;margin:40px 0 6px}
p{margin:6px 0 12px;max-width:78ch}.soft{color:var(--soft)}.small{font-size:13px}
code{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:12px;margin:20px 0 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card .name{color:var(--soft);font-size:13px}.card .value{font-size:25px;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}
.members{grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));margin-top:8px}.member{display:flex;gap:16px;align-items:center}
.member p{margin:4px 0 0;font-size:14px}.drawing{flex:none;max-width:100%}
.card .more{color:var(--soft);font-size:13px}
.sheet{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-size:12.5px;font-weight:600;color:var(--soft);white-space:nowrap;vertical-align:bottom}
tbody th{font-weight:500}data{white-space:nowrap}.right{text-align:right}.nowrap{white-space:nowrap}
td.bars{min-width:165px;width:15%}#layers th[scope]{min-width:170px}#layers td:last-child{min-width:150px}.track{background:var(--track);border-radius:3px;height:8px;display:flex;overflow:hidden;margin:3px 0}
.track.tall{height:16px}.bar{height:100%}.bar.dense{background:var(--dense)}.bar.sparse{background:var(--sparse)}
.pair{display:grid;grid-template-columns:minmax(60px,1fr) 58px;gap:0 8px;align-items:center}
.pair data{font-size:12px;line-height:14px;color:var(--soft);text-align:right;white-space:nowrap}
#parts:not(:checked)~.sheet tr.part{display:none}label[for=parts]{font-size:13px;color:var(--soft)}#parts~.sheet{margin-top:8px}
tr.part th{padding-left:28px}tr.part>*{font-size:13.5px}tr.whole>*{border-bottom-style:dashed}tr.rest>*{color:var(--soft)}
.badge{display:inline-block;padding:0 8px;border-radius:999px;border:1px solid currentColor;font-size:12px;line-height:18px;white-space:nowrap;color:var(--soft)}
.SparseWide{color:var(--wide)}.SparseParallel{color:var(--parallel)}.SparseFactorized{color:var(--factorized)}.SparseDoped{color:var(--doped)}
.LowRank{color:var(--low)}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 10px;font-size:13px;color:var(--soft)}
.key span::before{content:"";display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px;background:var(--c)}
.part-values{background:var(--values)}.part-gradients{background:var(--gradients)}.part-optimizer{background:var(--optimizer)}
.part-indices{background:var(--indices)}.part-buffers{background:var(--buffers)}
ul{margin:8px 0;padding-left:20px}li{margin:4px 0;max-width:90ch}
.ok{color:var(--accent);font-weight:600}.open{color:var(--warn);font-weight:600}
dl{margin:8px 0}dt{font-weight:600;margin-top:10px}dd{margin:0;max-width:82ch;color:var(--soft)}
summary{cursor:pointer;font-weight:600;margin-top:32px}footer{margin-top:40px;color:var(--soft);font-size:13px}
@media print{body{background:#fff}main{max-width:none;padding:0}.sheet{overflow:visible}}
"""
