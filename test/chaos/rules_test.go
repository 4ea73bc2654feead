package chaos

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The standard bridge plugin (1.9.1) leaves masquerading rules in two cases. Its DEL removes the pod's
// interface, then releases the address, and removes the rules of the interface's addresses last: if
// the release fails, or host-local is uninstalled at that moment, the next DEL finds no interface and
// no rules. And without the pod's network
// namespace it looks for no rules at all: if the plugin was uninstalled when the pod was removed, it
// gets a DEL without the namespace when it is back. The checker permits the rules of such pods.

// ruleOwner finds the pod in the comment of a masquerading rule, and ruleChain the pod's chain.
var (
	ruleOwner = regexp.MustCompile(`--comment "name: \\"chaos\\" id: \\"([0-9a-f]{64})\\""`)
	ruleChain = regexp.MustCompile(`\bCNI-[0-9a-f]{24}\b`)
	wasOwed   = regexp.MustCompile(`uninstalled while a pod ran.* plugins="?[^"]*\bbridge\b[^"]*"? pod=\S+ sandbox=([0-9a-f]{64})`)
	wasCutOff = regexp.MustCompile(`sandbox=([0-9a-f]{64}) .*type=\\"bridge\\" failed \(delete\): .*failed to find plugin \\"host-local\\"`)
)

// withoutLost returns the rules without those of pods whose rules the bridge plugin has lost.
func (l *lab) withoutLost(rules []string) []string {
	owed := map[string]bool{}
	log, _ := os.ReadFile(l.daemon.Log())
	for _, lost := range []*regexp.Regexp{wasOwed, wasCutOff} {
		for _, m := range lost.FindAllSubmatch(log, -1) {
			owed[string(m[1])] = true
		}
	}
	return withoutRulesOf(rules, func(pod string) bool { return l.cni.isBroken(pod) || owed[pod] })
}

// withoutRulesOf returns the rules without those of pods for which isLost is true, and without their
// chains.
func withoutRulesOf(rules []string, isLost func(pod string) bool) []string {
	chains := map[string]bool{}
	for _, r := range rules {
		if m := ruleOwner.FindStringSubmatch(r); m != nil && isLost(m[1]) {
			chains[ruleChain.FindString(r)] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(rules), func(r string) bool { return chains[ruleChain.FindString(r)] })
}

// TestWithoutRulesOf holds that only the rules of the pods in question are left out.
func TestWithoutRulesOf(t *testing.T) {
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
	kept := append(of("CNI-c2a00c7a6c311963c805ccab", other), "-A CNI-HOSTPORT-DNAT -p tcp -j CNI-DN-x", "-A FORWARD -j ACCEPT")
	all := append(of("CNI-110688650eeb7f40411497d9", id), kept...)
	if got := withoutRulesOf(all, func(pod string) bool { return pod == id }); !slices.Equal(got, kept) {
		t.Errorf("left %q", got)
	}
	if got := withoutRulesOf(all, func(string) bool { return false }); !slices.Equal(got, all) {
		t.Errorf("without a reason, left %q", got)
	}
}

// TestWasOwed holds that the daemon's report of an uninstalled bridge plugin is found, and no other.
func TestWasOwed(t *testing.T) {
	id := strings.Repeat("ab", 32)
	line := func(plugins string) string {
		return `level=WARN msg="CNI plugins were uninstalled while a pod ran; what they hold" plugins=` + plugins + " pod=chaos/pod-3-0 sandbox=" + id
	}
	for plugins, want := range map[string]bool{`bridge`: true, `"bridge, portmap"`: true, `portmap`: false} {
		if got := wasOwed.MatchString(line(plugins)); got != want {
			t.Errorf("plugins %s: %v, want %v", plugins, got, want)
		}
	}
	cutOff := `msg=StopPodSandbox sandbox=` + id + ` took=769.37ms code=Unknown err="stop sandbox x: disconnect pod x from network chaos: ` +
		`plugin type=\"bridge\" failed (delete): CNI error 999: failed to find plugin \"host-local\" in path [/x/cni]"`
	if m := wasCutOff.FindStringSubmatch(cutOff); m == nil || m[1] != id {
		t.Errorf("a release that was cut off: %q", m)
	}
}
