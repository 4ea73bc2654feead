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

// image gathers the files of an image from programs of the machine and of the cache.
type image struct {
	t     *testing.T
	files []engines.File
	have  map[string]bool
}

func newImage(t *testing.T) *image {
	i := &image{t: t, have: map[string]bool{"/": true, ".": true}}
	i.dir("/tmp", 0o1777)
	return i
}

func (i *image) dir(name string, mode int64) {
	if i.have[name] {
		return
	}
	i.have[name] = true
	i.dir(path.Dir(name), 0o755)
	i.files = append(i.files, engines.File{Header: tar.Header{Name: name[1:] + "/", Typeflag: tar.TypeDir, Mode: mode}})
}

// add adds a file of the machine, all names of which it reads now.
func (i *image) add(name, file string) {
	i.t.Helper()
	if i.have[name] {
		return
	}

	i.have[name] = true
	i.dir(path.Dir(name), 0o755)
	b, err := os.ReadFile(file)
	if err != nil {
		i.t.Fatalf("image: %v", err)
	}

	i.files = append(i.files, engines.File{Header: tar.Header{Name: name[1:], Mode: 0o755}, Content: b})
}

func (i *image) link(name, target string) {
	i.dir(path.Dir(name), 0o755)
	i.files = append(i.files, engines.File{Header: tar.Header{
		Name:     name[1:],
		Typeflag: tar.TypeSymlink,
		Linkname: target,
	}})
}

var library = regexp.MustCompile(`(/\S+\.so\S*) \(0x`)

// linked adds a program or plugin and the libraries it is linked with.
func (i *image) linked(name, file string) {
	i.t.Helper()
	i.add(name, file)
	out, err := exec.Command("ldd", file).Output()
	if err != nil {
		i.t.Fatalf("image: ldd %s: %v", file, err)
	}

	for _, m := range library.FindAllStringSubmatch(string(out), -1) {
		i.add(m[1], m[1])
	}
}

// iptables adds the machine's iptables, and a shell.
func (i *image) iptables() *image {
	i.t.Helper()
	multi, err := filepath.EvalSymlinks("/usr/sbin/iptables")
	if err != nil {
		i.t.Fatalf("image: %v", err)
	}

	i.linked(multi, multi)
	for _, n := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save",
		"ip6tables-restore"} {
		i.link("/usr/sbin/"+n, filepath.Base(multi))
	}

	extensions, err := filepath.Glob("/usr/lib/*/xtables/*.so")
	if err != nil || len(extensions) == 0 {
		i.t.Fatalf("image: no extensions of iptables: %v", err)
	}

	for _, e := range extensions {
		i.linked(e, e)
	}

	for _, f := range engines.BusyboxFiles(i.t) {
		if name := "/" + strings.TrimSuffix(f.Header.Name, "/"); !i.have[name] {
			i.have[name] = true
			i.files = append(i.files, f)
		}
	}

	i.dir("/run", 0o755)

	return i
}

// loadImages makes the images that a node runs, under the names that kubeadm asks for.
func loadImages(t *testing.T, n *nodes.Node, control bool) {
	t.Helper()
	load := func(ref string, i *image, program string) {
		t.Helper()
		i.add("/usr/local/bin/"+program, binary(program))
		engines.Import(t, n.Path("/run/docker.sock"), ref, i.files, `ENTRYPOINT ["/usr/local/bin/`+program+`"]`,
			"ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}

	for _, ref := range strings.Fields(n.Run(t, "sh", "-c", "kubeadm config images list"+" --kubernetes-version "+
		version)) {
		name, _, _ := strings.Cut(path.Base(ref), ":")
		switch name {
		case "kube-proxy":
			load(ref, newImage(t).iptables(), name)
		case "coredns":
			load(ref, newImage(t), name)
		case "pause": // wanted by kubeadm only; the daemon has its own
			engines.Import(t, n.Path("/run/docker.sock"), ref, newImage(t).files)
		case "kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd":
			if control {
				load(ref, newImage(t), name)
			}
		}
	}

	flannel := newImage(t).iptables()
	flannel.add("/flannel", filepath.Join(engines.Plugins(), "flannel"))
	load("cri-test/flannel:latest", flannel, "flanneld")
	load("cri-test/metrics-server:latest", newImage(t), "metrics-server")
	engines.LoadBusybox(t, n.Path("/run/docker.sock"))
}

const welcome = "Welcome\n"

// pushNginx pushes the image of the documentation's example to a registry.
func pushNginx(t *testing.T, n *nodes.Node, to string) {
	t.Helper()
	ref := to + "/library/nginx:latest"
	engines.Import(t, n.Path("/run/docker.sock"), ref, engines.BusyboxFiles(t), "ENV PATH=/bin",
		`CMD ["sh", "-c", "echo Welcome > /tmp/index.html; trap exit TERM; echo started; httpd -f -p 80 -h /tmp & wait"]`)
	n.Run(t, "docker", "push", ref)
	n.Run(t, "docker", "rmi", ref)
}
