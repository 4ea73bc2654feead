package cluster

import (
	"archive/tar"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// image collects the files of an image from programs of the host and of the cache.
type image struct {
	t     *testing.T
	files []engines.File
	added map[string]bool // by path
}

func newImage(t *testing.T) *image {
	i := &image{t: t, added: map[string]bool{"/": true, ".": true}}
	i.dir("/tmp", 0o1777)
	return i
}

// dir adds a directory and its parents.
func (i *image) dir(name string, mode int64) {
	if i.added[name] {
		return
	}
	i.added[name] = true
	i.dir(path.Dir(name), 0o755)
	i.files = append(i.files, engines.File{Header: tar.Header{Name: name[1:] + "/", Typeflag: tar.TypeDir, Mode: mode}})
}

// add adds a file of the host. It reads the file immediately.
func (i *image) add(name, file string) {
	i.t.Helper()
	if i.added[name] {
		return
	}

	i.added[name] = true
	i.dir(path.Dir(name), 0o755)
	b, err := os.ReadFile(file)
	if err != nil {
		i.t.Fatalf("image: %v", err)
	}

	i.files = append(i.files, engines.File{Header: tar.Header{Name: name[1:], Mode: 0o755}, Content: b})
}

// link adds a symbolic link.
func (i *image) link(name, target string) {
	i.dir(path.Dir(name), 0o755)
	i.files = append(i.files, engines.File{Header: tar.Header{
		Name:     name[1:],
		Typeflag: tar.TypeSymlink,
		Linkname: target,
	}})
}

var library = regexp.MustCompile(`(/\S+\.so\S*) \(0x`)

// linked adds a program or plugin with its libraries.
func (i *image) linked(name, file string) {
	i.t.Helper()
	i.add(name, file)
	out, err := exec.Command("ldd", file).Output()
	if err != nil {
		i.t.Fatalf("image: ldd %s: %v", file, err)
	}

	for _, m := range library.FindAllStringSubmatch(string(out), -1) {
		i.add(path.Clean(m[1]), m[1])
	}
}

// iptables adds the iptables of the host and a shell.
func (i *image) iptables() *image {
	i.t.Helper()
	multi, err := filepath.EvalSymlinks("/usr/sbin/iptables")
	if err != nil {
		i.t.Fatalf("image: %v", err)
	}

	i.linked(multi, multi)
	for _, n := range []string{
		"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore",
	} {
		i.link("/usr/sbin/"+n, filepath.Base(multi))
	}

	extensions, err := filepath.Glob("/usr/lib/*/xtables/*.so")
	if err != nil || len(extensions) == 0 {
		i.t.Fatalf("image: no extensions of iptables: %v", err)
	}

	for _, e := range extensions {
		i.linked(e, e)
	}

	i.busybox()
	i.dir("/run", 0o755)

	return i
}

// busybox adds the files of busybox that the image does not have.
func (i *image) busybox() {
	i.t.Helper()
	for _, f := range engines.BusyboxFiles(i.t) {
		if name := "/" + strings.TrimSuffix(f.Header.Name, "/"); !i.added[name] {
			i.added[name] = true
			i.files = append(i.files, f)
		}
	}
}

// loadProgram creates the image of a program from hack/kubernetes.sh.
func loadProgram(t *testing.T, n *nodes.Node, ref string, i *image, program string) {
	t.Helper()
	i.add("/usr/local/bin/"+program, binary(t, program))
	engines.Import(t, n.Path("/run/docker.sock"), ref, i.files, `ENTRYPOINT ["/usr/local/bin/`+program+`"]`,
		"ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

// loadImages creates the images of a node with the names from kubeadm.
func loadImages(t *testing.T, n *nodes.Node, control bool) {
	t.Helper()
	list := n.Run(t, "sh", "-c", "kubeadm config images list"+" --kubernetes-version "+engines.KubernetesVersion(t))
	for _, ref := range strings.Fields(list) {
		name, _, _ := strings.Cut(path.Base(ref), ":")
		switch name {
		case "kube-proxy":
			loadProgram(t, n, ref, newImage(t).iptables(), name)
		case "coredns":
			loadProgram(t, n, ref, newImage(t), name)
		case "pause": // only for kubeadm; the daemon embeds its own
			engines.Import(t, n.Path("/run/docker.sock"), ref, newImage(t).files)
		case "kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd":
			if control {
				loadProgram(t, n, ref, newImage(t), name)
			}
		}
	}

	loadProgram(t, n, "cri-test/metrics-server:latest", newImage(t), "metrics-server")
	loadShop(t, n)
	engines.LoadBusybox(t, n.Path("/run/docker.sock"))
}

const welcome = "Welcome\n"

// pushNginx pushes an image for the example of the documentation to a registry.
func pushNginx(t *testing.T, n *nodes.Node, to string) {
	t.Helper()
	ref := to + "/library/nginx:latest"
	engines.Import(t, n.Path("/run/docker.sock"), ref, engines.BusyboxFiles(t), "ENV PATH=/bin",
		`CMD ["sh", "-c", "echo Welcome > /tmp/index.html; trap exit TERM; echo started; `+
			`httpd -f -p 80 -h /tmp & wait"]`)
	n.Run(t, "docker", "push", ref)
	n.Run(t, "docker", "rmi", ref)
}
