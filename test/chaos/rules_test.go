package chaos

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The standard bridge plugin (1.9.1) leaves masquerading rules behind in two cases. Its DEL removes
// the pod's interface, then releases the address, and finally removes the rules for the interface's
// addresses. If the release fails, or host-local is uninstalled at that moment, the next DEL finds
// no interface and no rules. And without the pod's network namespace it skips the rules: if the
// plugin was uninstalled during the removal of a pod, it later gets a DEL without the namespace.
// The checker permits the rules of such pods.

// ruleOwner matches the pod in the comment of a masquerading rule, and ruleChain the pod's chain.
var (
	ruleOwner     = regexp.MustCompile(`--comment "name: \\"chaos\\" id: \\"([0-9a-f]{64})\\""`)
	ruleChain     = regexp.MustCompile(`\bCNI-[0-9a-f]{24}\b`)
	pluginMissing = regexp.MustCompile(`uninstalled while a pod was running.* ` +
		`plugins=(?:bridge|"[^"]*\bbridge\b[^"]*") pod=\S+ sandbox=([0-9a-f]{64})`)
)

// filterLostRules filters out the rules lost by the bridge plugin.
func (l *lab) filterLostRules(rules []string) []string {
	log, _ := os.ReadFile(l.daemon.Log())
	missing := podsWithMissingPlugin(string(log))
	return filterRules(rules, func(pod string) bool { return l.cni.isBroken(pod) || missing[pod] })
}

// podsWithMissingPlugin returns the pods with a report of an uninstalled bridge plugin in the
// daemon's log.
func podsWithMissingPlugin(log string) map[string]bool {
	missing := map[string]bool{}
	for line := range strings.Lines(log) {
		if m := pluginMissing.FindStringSubmatch(line); m != nil {
			missing[m[1]] = true
		}
	}
	return missing
}

// filterRules filters out the rules and chains of pods for which isLost is true.
func filterRules(rules []string, isLost func(pod string) bool) []string {
	chains := map[string]bool{}
	for _, r := range rules {
		if m := ruleOwner.FindStringSubmatch(r); m != nil && isLost(m[1]) {
			chains[ruleChain.FindString(r)] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(rules), func(r string) bool { return chains[ruleChain.FindString(r)] })
}

// TestFilterRules checks that only the rules of these pods are filtered out.
func TestFilterRules(t *testing.T) {
	id, other := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	of := func(chain, id string) []string {
		comment := `-m comment --comment "name: \"chaos\" id: \"` + id + `\""`
		return []string{
			":" + chain + " -",
			"-A " + chain + " -d 10.66.0.0/16 " + comment + " -j ACCEPT",
			"-A " + chain + " ! -d 224.0.0.0/4 " + comment + " -j MASQUERADE",
			"-A POSTROUTING -s 10.66.0.30/32 " + comment + " -j " + chain,
		}
	}

	kept := append(of("CNI-c2a00c7a6c311963c805ccab", other), "-A CNI-HOSTPORT-DNAT -p tcp -j CNI-DN-x",
		"-A FORWARD -j ACCEPT")
	all := append(of("CNI-110688650eeb7f40411497d9", id), kept...)
	if got := filterRules(all, func(pod string) bool { return pod == id }); !slices.Equal(got, kept) {
		t.Errorf("remaining %q", got)
	}
	if got := filterRules(all, func(string) bool { return false }); !slices.Equal(got, all) {
		t.Errorf("without a reason: remaining %q", got)
	}
}

// TestPodsWithMissingPlugin checks that exactly the reports of an uninstalled bridge plugin are
// found.
func TestPodsWithMissingPlugin(t *testing.T) {
	id, other := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	uninstalled := func(plugins string) string {
		return `level=WARN msg="CNI plugins were uninstalled while a pod was running" plugins=` + plugins +
			" pod=chaos/pod-3-0 sandbox=" + id
	}

	next := "\nlevel=INFO msg=RunPodSandbox namespace=chaos pod=pod-3-1 sandbox=" + other + "\n"
	for log, want := range map[string]bool{
		uninstalled(`bridge`):            true,
		uninstalled(`"bridge, portmap"`): true,
		uninstalled(`portmap`):           false,
	} {
		if got := podsWithMissingPlugin(next + log + next); got[id] != want || len(got) > 1 || got[other] {
			t.Errorf("%s: %v, want %v", log, got, want)
		}
	}
}
